"""Numbers as 8-bit formats: float8_e4m3fn with saturation, and int8.

float8_e4m3fn (Micikevicius et al. 2022) has a sign, 4 bits of exponent and 3 of mantissa, no infinity, 448 as its
largest number. Some GPUs do not convert it: there it is stored as bits, in uint8.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FLOAT8 = tl.constexpr(448.0)
LARGEST_INT8 = tl.constexpr(127.0)
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to the nearest integer


@triton.jit
def to_stored(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return float32 numbers in the format of a cache; uint8 stands for float8_e4m3fn. NaN stays NaN."""
    if dtype == tl.float8e4nv:
        stored = _saturated(x).to(dtype)
    elif dtype == tl.uint8:
        stored = _float8_bits(x)
    else:
        stored = x.to(dtype)
    return stored


@triton.jit
def nearest_int8(x: tl.tensor) -> tl.tensor:
    """Return numbers within -127 .. 127 as int8, rounded to the nearest and ties to even."""
    return ((x + _NEAREST) - _NEAREST).to(tl.int8)


@triton.jit
def _saturated(x: tl.tensor) -> tl.tensor:
    x = tl.where(x > LARGEST_FLOAT8, LARGEST_FLOAT8, x)
    return tl.where(x < -LARGEST_FLOAT8, -LARGEST_FLOAT8, x)


@triton.jit
def _float8_bits(x: tl.tensor) -> tl.tensor:
    bits = _saturated(x).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # normal: round the mantissa to 3 bits, to even in a tie, and move the exponent's bias from 127 to 7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6: a multiple of 2^-9
    small = (size.to(tl.float32, bitcast=True) * 512.0 + _NEAREST) - _NEAREST
    found = tl.where(size < (121 << 23), small.to(tl.int32), normal)
    found = tl.where(size > 0x7F800000, 0x7F, found)
    return (found | ((bits >> 24) & 0x80)).to(tl.uint8)
