"""Decode attention: few queries of a sequence over its whole context, split into ranges that programs share.

Rows of a program: queries of one sequence times the heads of one KV head's group. Contexts are cut at multiples of a
fixed number of tokens, whatever the batch; `merge_splits` combines the parts (Flash-Decoding, Dao et al. 2023).

T tokens of a step · H query heads · K KV heads · G = H / K · D head size · N blocks · B slots per block ·
S sequences · W blocks per table · X = S + 1 · M rows of a tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batchinfer_kernels.triton.attend_keys import attend_keys, score_factor
from batchinfer_kernels.triton.attention_launch import attention_case
from batchinfer_kernels.triton.step_index import SPLIT_TOKENS
from batchinfer_kernels.triton.targets import AotCase, Target


@triton.jit(do_not_specialize=["num_slots"])
def decode_attention_kernel(
    q_THD: tl.tensor,
    kv_N2KBD: tl.tensor,
    out_THD: tl.tensor,
    parts: tl.tensor,  # float32 [S, K, splits, MAX_QUERIES * G, D]
    logsums: tl.tensor,  # float32 [S, K, splits, MAX_QUERIES * G], to base 2; -inf: the row sees nothing of the split
    block_tables_SW: tl.tensor,
    query_starts_X: tl.tensor,
    lengths_S: tl.tensor,
    prompt_S: tl.tensor,
    seats_S: tl.tensor,
    num_slots: tl.tensor,  # splits that `parts` has room for
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
    SPLIT_TOKENS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Attend with one sequence's queries, for one KV head, to every L-th split of the context, for L programs."""
    sequence = tl.program_id(0)
    TILES: tl.constexpr = (MAX_QUERIES * GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(1) // TILES
    first_row = tl.program_id(1) % TILES * BLOCK_M
    query_start, count, length = load_decode(sequence, query_starts_X, lengths_S, prompt_S, MAX_QUERIES)
    first_split, end_split = splits_of(count, length, WINDOW, SPLIT_TOKENS)
    if (first_split + tl.program_id(2) >= end_split) | (first_row >= count * GROUP):
        return
    row_M = first_row + tl.arange(0, BLOCK_M)
    query_M = row_M // GROUP
    d_1D = tl.arange(0, HEAD_WIDTH)[None, :]
    real_MD = (query_M < count)[:, None] & (d_1D < HEAD_SIZE)
    head_M = kv_head * GROUP + row_M % GROUP
    token_M = (query_start + query_M).to(tl.int64)
    q_at_MD = q_THD + (token_M * q_stride_T + head_M * q_stride_H)[:, None] + d_1D
    q_MD = tl.load(q_at_MD, mask=real_MD, other=0).to(DOT)
    out_at_MD = out_THD + (token_M * out_stride_T + head_M * out_stride_H)[:, None] + d_1D
    part = (sequence * (tl.num_programs(1) // TILES) + kv_head).to(tl.int64) * num_slots
    seat = sequence
    if seats_S is not None:
        seat = tl.load(seats_S + sequence)
    # addresses computed before this loop would take registers from the loop over keys
    for split in tl.range(first_split + tl.program_id(2), end_split, tl.num_programs(2), disable_licm=True):
        begin = split * SPLIT_TOKENS
        end = tl.minimum(begin + SPLIT_TOKENS, length)
        low = begin
        if WINDOW:
            low = tl.maximum(begin, length - count - WINDOW + 1)
            begin = low // BLOCK_N * BLOCK_N
        acc_MD, peak_M, total_M = attend_keys(
            tl.zeros([BLOCK_M, HEAD_WIDTH], tl.float32),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            q_MD,
            length - count + query_M,
            kv_N2KBD + kv_head.to(tl.int64) * kv_stride_K,
            block_tables_SW + seat.to(tl.int64) * table_stride,
            begin,
            end,
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
        if end_split - first_split == 1:
            tl.store(out_at_MD, acc_MD.to(out_THD.dtype.element_ty), mask=real_MD)
        else:
            part_row_M = (part + split - first_split) * (MAX_QUERIES * GROUP) + row_M
            logsum_M = peak_M * score_factor(scale, CAPPED) + tl.log2(total_M)
            tl.store(logsums + part_row_M, logsum_M, mask=query_M < count)
            tl.store(parts + part_row_M[:, None] * HEAD_SIZE + d_1D, acc_MD, mask=real_MD)


@triton.jit
def load_decode(
    sequence: tl.tensor,
    query_starts_X: tl.tensor,
    lengths_S: tl.tensor,
    prompt_S: tl.tensor,
    MAX_QUERIES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a sequence's first query, its queries, and its length; 0 queries if it is not computed as a decode."""
    query_start = tl.load(query_starts_X + sequence).to(tl.int32)
    count = tl.load(query_starts_X + sequence + 1).to(tl.int32) - query_start
    is_prompt = tl.load(prompt_S + sequence) != 0
    count = tl.where((count > MAX_QUERIES) | is_prompt, 0, count)
    return query_start, count, tl.load(lengths_S + sequence).to(tl.int32)


@triton.jit
def splits_of(
    count: tl.tensor, length: tl.tensor, WINDOW: tl.constexpr, SPLIT_TOKENS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first split that a query of a decode sees, and the end of the splits; equal without queries."""
    first_split = 0
    if WINDOW:
        first_split = tl.maximum(length - count - WINDOW + 1, 0) // SPLIT_TOKENS
    end_split = (length + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    return first_split, tl.where(count > 0, end_split, first_split)


def aot_cases(target: Target) -> list[AotCase]:
    """Return one query per sequence for each head size, and drafts of a large group."""
    shapes = [(torch.bfloat16, 64, 7, 1), (torch.bfloat16, 128, 4, 1), (torch.bfloat16, 256, 2, 1)]
    shapes += [(torch.float8_e4m3fn, 128, 5, 1), (torch.bfloat16, 128, 8, 8)]
    cases = []
    for dtype, size, group, queries in shapes:
        rows = block_rows(group, queries)
        constants = {"GROUP": group, "MAX_QUERIES": queries, "SPLIT_TOKENS": SPLIT_TOKENS, "BLOCK_M": rows}
        cases.append(attention_case(launch_name(rows), decode_attention_kernel, target, dtype, size, constants))
    return cases


def block_rows(group: int, max_queries: int) -> int:
    """Return the rows of a program; more queries and heads are further programs."""
    rows: int = triton.next_power_of_2(max_queries * group)
    return min(max(16, rows), 64)


def launch_name(rows: int) -> str:
    """Return the name of a program's launch configuration."""
    return "decode_attention" if rows == 16 else "draft_attention"
