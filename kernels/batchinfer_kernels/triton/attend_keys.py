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
    high: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    stride_block: tl.tensor,
    stride_part: tl.tensor,
    stride_slot: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add positions begin .. end - 1, a tile of BLOCK_N at a time, to the sum of values, the peak and the total.

    `begin` is a multiple of BLOCK_N. Keys outside low .. high - 1 are not read. Unless MASKED, all positions are in
    this range and seen by every row. `peak_M` and `total_M` are in powers of two. keys: the head's first key in block
    0; table: the sequence's first entry; WINDOW 0: none.
    """
    n_N = tl.arange(0, BLOCK_N)
    d_1D = tl.arange(0, q_MD.shape[1])[None, :]
    block_N = tl.load(table + (begin + n_N) // BLOCK_SIZE, mask=begin + n_N < high, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        key_N = start + n_N
        next_N = key_N + BLOCK_N
        next_block_N = tl.load(table + next_N // BLOCK_SIZE, mask=next_N < high, other=0)
        place_N1 = (block_N.to(tl.int64) * stride_block + (key_N % BLOCK_SIZE) * stride_slot)[:, None]
        at_ND = keys + place_N1 + d_1D
        read_N = (key_N >= low) & (key_N < high)
        k_ND = widen(load_keys(at_ND, read_N, d_1D, HEAD_SIZE, MASKED), q_MD.dtype)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        if CAPPED:
            score_MN = cap(score_MN, soft_cap)
        score_MN *= LOG2E
        if MASKED:
            seen_MN = (key_N[None, :] <= position_M[:, None]) & read_N[None, :]
            if WINDOW:
                seen_MN &= key_N[None, :] > position_M[:, None] - WINDOW
            score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(score_MN, 1))
        # a row that has seen no key yet: its weights become exp2(-inf), not NaN
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        weight_MN = tl.exp2(score_MN - base_M[:, None])
        kept_M = tl.exp2(peak_M - base_M)
        v_ND = widen(load_keys(at_ND + stride_part, read_N, d_1D, HEAD_SIZE, MASKED), q_MD.dtype)
        total_M = total_M * kept_M + tl.sum(weight_MN, 1)
        acc_MD = tl.dot(weight_MN.to(q_MD.dtype), v_ND, acc_MD * kept_M[:, None], input_precision="ieee")
        peak_M = new_peak_M
        block_N = next_block_N
    return acc_MD, peak_M, total_M


@triton.jit
def load_keys(
    at_ND: tl.tensor, read_N: tl.tensor, d_1D: tl.tensor, HEAD_SIZE: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """Load keys or values; those that are not read, and a head's padding, are 0."""
    if at_ND.shape[1] == HEAD_SIZE:
        return tl.load(at_ND, mask=read_N[:, None], other=0.0) if MASKED else tl.load(at_ND)
    real_1D = d_1D < HEAD_SIZE
    return tl.load(at_ND, mask=read_N[:, None] & real_1D if MASKED else real_1D, other=0.0)


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
