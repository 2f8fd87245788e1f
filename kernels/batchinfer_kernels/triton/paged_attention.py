"""Attention over a cache of blocks: one launch for decodes, a merge of their splits, one launch for prompts.

T tokens of a step · H query heads · K KV heads · D head size · N blocks · B slots per block · S sequences
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from batchinfer_kernels.contract import ScoreRule
from batchinfer_kernels.triton.attention_launch import attention_launch, dot_dtype
from batchinfer_kernels.triton.decode_attention import block_rows, decode_attention_kernel, launch_name
from batchinfer_kernels.triton.merge_splits import BLOCK_C, merge_splits_kernel
from batchinfer_kernels.triton.prompt_attention import prompt_attention_kernel
from batchinfer_kernels.triton.step_index import TritonStepIndex
from batchinfer_kernels.triton.targets import config, target_of

PROGRAMS = 2048
"""Programs of decodes that fill a GPU several times over: where there are fewer sequences, their splits are spread.

A program without a split is not free, as it waits for room like the others: so where there are as many sequences, each
has one program per KV head, which computes its splits one by one. Results are the same.
"""


def paged_attention(
    q_THD: Tensor, kv_N2KBD: Tensor, index: TritonStepIndex, rule: ScoreRule, out_THD: Tensor | None = None
) -> Tensor:
    """Attend with the step's queries; launches depend on shapes and bounds alone. Rows of no sequence are not written.

    Products of 16-bit queries are computed in the cache's format, float16 where that is float8_e4m3fn.
    """
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out_THD is None else out_THD
    if kv_N2KBD.dtype == torch.float8_e4m3fn and not target_of(kv_N2KBD.device).float8_e4m3fn:
        kv_N2KBD = kv_N2KBD.view(torch.uint8)
    _attend_decodes(q_THD, kv_N2KBD, index, rule, out_THD)
    if index.step.has_prompts:
        _attend_prompts(q_THD, kv_N2KBD, index, rule, out_THD)
    return out_THD


def _attend_decodes(q_THD: Tensor, kv_N2KBD: Tensor, index: TritonStepIndex, rule: ScoreRule, out_THD: Tensor) -> None:
    step = index.step
    heads, size = q_THD.shape[1:]
    kv_heads = kv_N2KBD.shape[2]
    rows = step.max_queries * (heads // kv_heads)
    block_m = block_rows(heads // kv_heads, step.max_queries)
    launch = attention_launch(launch_name(block_m), q_THD.device, size, kv_N2KBD.dtype)
    slots = num_slots(index, rule.window)
    sequences = len(step.lengths_S)
    many = slots > 1
    space = (sequences, kv_heads, slots, rows)
    parts = torch.empty(*space, size, dtype=torch.float32, device=q_THD.device) if many else out_THD
    logsums = torch.empty(space, dtype=torch.float32, device=q_THD.device) if many else out_THD
    tiles = kv_heads * triton.cdiv(rows, block_m)
    decode_attention_kernel[sequences, tiles, min(slots, triton.cdiv(PROGRAMS, sequences * tiles))](
        q_THD,
        kv_N2KBD,
        out_THD,
        parts,
        logsums,
        *_step_arguments(index),
        slots,
        *_layer_arguments(q_THD, kv_N2KBD, index, rule, out_THD),
        *_constants(q_THD, kv_N2KBD, rule),
        step.max_queries,
        index.split_tokens,
        dot_dtype(q_THD.dtype, kv_N2KBD.dtype),
        block_m,
        launch.block_n,
        **launch.options,
    )
    if not many:
        return
    launch = config("merge_splits", q_THD.device)
    merge_splits_kernel[sequences, heads, step.max_queries](
        parts,
        logsums,
        out_THD,
        step.query_starts_X,
        step.lengths_S,
        step.prompt_S,
        slots,
        *out_THD.stride()[:2],
        heads // kv_heads,
        size,
        triton.next_power_of_2(size),
        rule.window or 0,
        step.max_queries,
        index.split_tokens,
        BLOCK_C,
        **launch.options,
    )


def _attend_prompts(q_THD: Tensor, kv_N2KBD: Tensor, index: TritonStepIndex, rule: ScoreRule, out_THD: Tensor) -> None:
    step = index.step
    tokens, heads, size = q_THD.shape
    kv_heads = kv_N2KBD.shape[2]
    group = heads // kv_heads
    launch = attention_launch("prompt_attention", q_THD.device, size, kv_N2KBD.dtype)
    block_m = max(launch.block_m, triton.next_power_of_2(group))
    sequences = len(step.lengths_S)
    prompt_attention_kernel[tokens // (block_m // group) + sequences, kv_heads](
        q_THD,
        kv_N2KBD,
        out_THD,
        *_step_arguments(index),
        sequences,
        *_layer_arguments(q_THD, kv_N2KBD, index, rule, out_THD),
        *_constants(q_THD, kv_N2KBD, rule),
        step.max_queries,
        dot_dtype(q_THD.dtype, kv_N2KBD.dtype),
        block_m,
        launch.block_n,
        **launch.options,
    )


def num_slots(index: TritonStepIndex, window: int | None) -> int:
    """Return how many splits of a context the queries of a decode can see."""
    if window is None:
        return index.num_splits
    seen_tokens = window + index.step.max_queries - 1
    return min(index.num_splits, -(-(seen_tokens - 1) // index.split_tokens) + 1)


def _step_arguments(index: TritonStepIndex) -> tuple[Tensor | None, ...]:
    step = index.step
    return step.block_tables_SW, step.query_starts_X, step.lengths_S, step.prompt_S, step.seats_S


def _layer_arguments(
    q_THD: Tensor, kv_N2KBD: Tensor, index: TritonStepIndex, rule: ScoreRule, out_THD: Tensor
) -> tuple[float | int, ...]:
    return (
        rule.scale,
        rule.soft_cap or 1.0,
        index.step.block_tables_SW.stride(0),
        *q_THD.stride()[:2],
        *out_THD.stride()[:2],
        *kv_N2KBD.stride()[:4],
    )


def _constants(q_THD: Tensor, kv_N2KBD: Tensor, rule: ScoreRule) -> tuple[int | bool, ...]:
    heads, size = q_THD.shape[1:]
    kv_heads, block_size = kv_N2KBD.shape[2:4]
    width = max(16, triton.next_power_of_2(size))  # the least that a tensor core's product takes
    return heads // kv_heads, size, width, block_size, rule.window or 0, rule.soft_cap is not None
