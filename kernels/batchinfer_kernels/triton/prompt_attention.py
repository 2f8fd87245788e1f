"""Prompt attention: chunks of prompts, with whatever is cached before them, a tile of queries per program.

Tiles are counted per sequence on a static grid: sequence s begins at tile query_starts[s] // queries + s, which leaves
room for every sequence's last, partial tile, so that programs find their sequence by binary search in device memory.

T tokens of a step · H query heads · K KV heads · G = H / K · D head size · N blocks · B slots per block ·
S sequences · W blocks per table · X = S + 1 · M rows of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchinfer_kernels.triton.attend_keys import attend_keys
from batchinfer_kernels.triton.attention_launch import attention_case
from batchinfer_kernels.triton.targets import AotCase, Target


@triton.jit(do_not_specialize=["num_sequences"])
def prompt_attention_kernel(
    q_THD: tl.tensor,
    kv_N2KBD: tl.tensor,
    out_THD: tl.tensor,
    block_tables_SW: tl.tensor,
    query_starts_X: tl.tensor,
    lengths_S: tl.tensor,
    prompt_S: tl.tensor,
    seats_S: tl.tensor,
    num_sequences: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    table_stride: tl.tensor,
    q_stride_T: tl.tensor,
    q_stride_H: tl.tensor,
    out_stride_T: tl.tensor,
    out_stride_H: tl.tensor,
    kv_stride_N: tl.tensor,
    kv_stride_2: tl.tensor,
    kv_stride_K: tl.tensor,
    kv_stride_B: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Attend with one tile of a sequence's queries, for one KV head, to all that they see."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = find_sequence(tile, query_starts_X, num_sequences, QUERIES)
    query_start = tl.load(query_starts_X + sequence).to(tl.int32)
    count = tl.load(query_starts_X + sequence + 1).to(tl.int32) - query_start
    first_query = (tile - query_start // QUERIES - sequence) * QUERIES
    is_decode = (count <= MAX_QUERIES) & (tl.load(prompt_S + sequence) == 0)
    if (first_query >= count) | is_decode:
        return
    length = tl.load(lengths_S + sequence).to(tl.int32)
    row_M = tl.arange(0, BLOCK_M)
    query_M = first_query + row_M // GROUP
    d_1D = tl.arange(0, HEAD_WIDTH)[None, :]
    real_MD = ((row_M < QUERIES * GROUP) & (query_M < count))[:, None] & (d_1D < HEAD_SIZE)
    head_M = kv_head * GROUP + row_M % GROUP
    token_M = (query_start + query_M).to(tl.int64)
    q_at_MD = q_THD + (token_M * q_stride_T + head_M * q_stride_H)[:, None] + d_1D
    q_MD = tl.load(q_at_MD, mask=real_MD, other=0).to(DOT)
    seat = sequence
    if seats_S is not None:
        seat = tl.load(seats_S + sequence)
    first_position = length - count + first_query
    high = tl.minimum(first_position + QUERIES, length)
    low = 0
    if WINDOW:
        low = tl.maximum(first_position - WINDOW + 1, 0)
    begin = low // BLOCK_N * BLOCK_N
    acc_MD, _, total_M = attend_keys(
        tl.zeros([BLOCK_M, HEAD_WIDTH], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        q_MD,
        first_position + row_M // GROUP,
        kv_N2KBD + kv_head.to(tl.int64) * kv_stride_K,
        block_tables_SW + seat.to(tl.int64) * table_stride,
        begin,
        high,
        low,
        scale,
        soft_cap,
        kv_stride_N,
        kv_stride_2,
        kv_stride_B,
        HEAD_SIZE,
        BLOCK_SIZE,
        WINDOW,
        CAPPED,
        BLOCK_N,
    )
    acc_MD /= tl.where(total_M > 0, total_M, 1.0)[:, None]
    out_at_MD = out_THD + (token_M * out_stride_T + head_M * out_stride_H)[:, None] + d_1D
    tl.store(out_at_MD, acc_MD.to(out_THD.dtype.element_ty), mask=real_MD)


@triton.jit
def find_sequence(
    tile: tl.tensor, query_starts_X: tl.tensor, num_sequences: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """Return the last sequence whose first tile is not after `tile`."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(query_starts_X + middle).to(tl.int32) // QUERIES + middle > tile
        low = tl.where(is_later, low, middle)
        high = tl.where(is_later, middle, high)
    return low


def aot_cases(target: Target) -> list[AotCase]:
    """Return a prompt for each head size, over keys of 16 and of 8 bits."""
    shapes = [
        (torch.bfloat16, 64, 7),
        (torch.bfloat16, 128, 4),
        (torch.bfloat16, 256, 2),
        (torch.float8_e4m3fn, 128, 5),
    ]
    return [
        attention_case(
            "prompt_attention", prompt_attention_kernel, target, dtype, size, {"GROUP": group, "MAX_QUERIES": 1}
        )
        for dtype, size, group in shapes
    ]
