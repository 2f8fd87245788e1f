"""Loop over keys and values in a paged cache that decode attention and prompt attention share: online softmax.

Rows of a tile are queries times the heads of a group, so that one product serves all heads that share a KV head. Block
ids are carried one iteration ahead, so that copies of keys and values depend on no load of the same iteration and the
compiler can run them ahead through several buffers.

M rows of a tile · N keys of one iteration · D head size, padded to a power of two · B slots per block
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_keys(
    acc_MD: tl.tensor,
    peak_M: tl.tensor,
    total_M: tl.tensor,
    q_MD: tl.tensor,
    position_M: tl.tensor,
    keys: tl.tensor,
    table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    low: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    stride_block: tl.tensor,
    stride_part: tl.tensor,
    stride_slot: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add positions begin .. end - 1, a tile of BLOCK_N at a time, to the sum of values, the peak and the total.

    A score's weight is exp2((score - peak) * `score_factor`). `begin` is a multiple of BLOCK_N, so that sums run in one
    order wherever a context is entered. Keys outside low .. end - 1 are not read. keys: the head's first key in block
    0; table: the sequence's first entry; WINDOW 0: none.
    """
    n_N = tl.arange(0, BLOCK_N)
    d_1D = tl.arange(0, q_MD.shape[1])[None, :]
    factor = score_factor(scale, CAPPED)
    block_N = tl.load(table + (begin + n_N) // BLOCK_SIZE, mask=begin + n_N < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        key_N = start + n_N
        next_N = key_N + BLOCK_N
        next_block_N = tl.load(table + next_N // BLOCK_SIZE, mask=next_N < end, other=0)
        place_N1 = (block_N.to(tl.int64) * stride_block + (key_N % BLOCK_SIZE) * stride_slot)[:, None]
        read_ND = ((key_N >= low) & (key_N < end))[:, None]
        if q_MD.shape[1] != HEAD_SIZE:
            read_ND = read_ND & (d_1D < HEAD_SIZE)
        k_ND = widen(tl.load(keys + place_N1 + d_1D, mask=read_ND, other=0.0), q_MD.dtype)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if CAPPED:
            score_MN = cap(score_MN * scale, soft_cap)
        # keys that are not read lie beyond a row's position or before its window
        seen_MN = key_N[None, :] <= position_M[:, None]
        if WINDOW:
            seen_MN &= key_N[None, :] > position_M[:, None] - WINDOW
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1))
        # a row that has seen no key yet: its weights become exp2(-inf), not NaN
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M) * factor
        weight_MN = tl.exp2(score_MN * factor - base_M[:, None])
        kept_M = tl.exp2(peak_M * factor - base_M)
        v_ND = widen(tl.load(keys + stride_part + place_N1 + d_1D, mask=read_ND, other=0.0), q_MD.dtype)
        total_M = total_M * kept_M + tl.sum(weight_MN, 1)
        acc_MD = tl.dot(weight_MN.to(q_MD.dtype), v_ND, acc_MD * kept_M[:, None], input_precision="ieee")
        peak_M = new_peak_M
        block_N = next_block_N
    return acc_MD, peak_M, total_M


@triton.jit
def score_factor(scale: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """Return the factor of scores in powers of two; capped scores are scaled already."""
    return LOG2E if CAPPED else scale * LOG2E


@triton.jit
def cap(score: tl.tensor, soft_cap: tl.tensor) -> tl.tensor:
    """Return soft_cap * tanh(score / soft_cap)."""
    power = tl.exp2(score * (2 * LOG2E / soft_cap))
    return soft_cap - 2 * soft_cap / (power + 1)


@triton.jit
def widen(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return keys or values as the products take them; bytes are float8_e4m3fn's bits, which become float16.

    A device without a conversion: four bits of exponent below float16's fifth are the value divided by 2^8.
    """
    if x.dtype == tl.uint8:
        bits = ((x.to(tl.int16) << 8) >> 1) & -16385  # the shift copies the sign into the fifth exponent bit: clear it
        x = bits.to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)
