"""Merge of the splits of decode attention: their results weighted by the sums of their exponentials, in float32.

T tokens of a step · H query heads · K KV heads · G = H / K · D head size · S sequences · X = S + 1 · C splits at a time
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchinfer_kernels.triton.decode_attention import load_decode, splits_of
from batchinfer_kernels.triton.step_index import SPLIT_TOKENS
from batchinfer_kernels.triton.targets import AotCase, Target, config

BLOCK_C = 8


@triton.jit(do_not_specialize=["num_slots"])
def merge_splits_kernel(
    parts: tl.tensor,  # as decode_attention writes them
    logsums: tl.tensor,
    out_THD: tl.tensor,
    query_starts_X: tl.tensor,
    lengths_S: tl.tensor,
    prompt_S: tl.tensor,
    num_slots: tl.tensor,
    out_stride_T: tl.tensor,
    out_stride_H: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Merge the splits of one query and head. Sums run in the order of positions, by fixed groups of BLOCK_C splits."""
    sequence, head, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start, count, length = load_decode(sequence, query_starts_X, lengths_S, prompt_S, MAX_QUERIES)
    first_split, end_split = splits_of(count, length, WINDOW, SPLIT_TOKENS)
    if (end_split - first_split <= 1) | (query >= count):
        return
    kv_heads = tl.num_programs(1) // GROUP
    part = (sequence * kv_heads + head // GROUP).to(tl.int64) * num_slots - first_split
    row = query * GROUP + head % GROUP
    c_C = tl.arange(0, BLOCK_C)
    d_D = tl.arange(0, HEAD_WIDTH)
    begin = first_split // BLOCK_C * BLOCK_C
    peak = tl.full([], float("-inf"), tl.float32)
    for split in range(begin, end_split, BLOCK_C):
        split_C = split + c_C
        row_C = (part + split_C) * (MAX_QUERIES * GROUP) + row
        logsum_C = tl.load(logsums + row_C, mask=(split_C >= first_split) & (split_C < end_split), other=float("-inf"))
        peak = tl.maximum(peak, tl.max(logsum_C, 0))
    total = tl.full([], 0.0, tl.float32)
    acc_D = tl.zeros([HEAD_WIDTH], tl.float32)
    for split in range(begin, end_split, BLOCK_C):
        split_C = split + c_C
        real_C = (split_C >= first_split) & (split_C < end_split)
        row_C = (part + split_C) * (MAX_QUERIES * GROUP) + row
        weight_C = tl.exp2(tl.load(logsums + row_C, mask=real_C, other=float("-inf")) - peak)
        part_CD = tl.load(
            parts + row_C[:, None] * HEAD_SIZE + d_D[None, :],
            mask=real_C[:, None] & (d_D < HEAD_SIZE)[None, :],
            other=0.0,
        )
        total += tl.sum(weight_C, 0)
        acc_D += tl.sum(weight_C[:, None] * part_CD, 0)
    out_at_D = out_THD + (query_start + query).to(tl.int64) * out_stride_T + head * out_stride_H + d_D
    tl.store(out_at_D, (acc_D / total).to(out_THD.dtype.element_ty), mask=d_D < HEAD_SIZE)


def aot_cases(target: Target) -> list[AotCase]:
    """Return the merge of one query per sequence for the commonest head size."""
    types = {"parts": "*fp32", "logsums": "*fp32", "out_THD": "*bf16", "prompt_S": "*i1", "num_slots": "i32"}
    types |= {"query_starts_X": "*i32", "lengths_S": "*i32", "out_stride_T": "i32", "out_stride_H": "i32"}
    constants = {"GROUP": 4, "HEAD_SIZE": 128, "HEAD_WIDTH": 128, "WINDOW": 0, "MAX_QUERIES": 1}
    constants |= {"SPLIT_TOKENS": SPLIT_TOKENS, "BLOCK_C": BLOCK_C}
    return [
        AotCase(
            name="merge_splits 128",
            function=merge_splits_kernel,
            signature={name: types[name] for name in merge_splits_kernel.arg_names if name in types},
            constexprs=constants,
            launch=config("merge_splits", target),
            divisible=[name for name in types if name != "num_slots"],
        )
    ]
