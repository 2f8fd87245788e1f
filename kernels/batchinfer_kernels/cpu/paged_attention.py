"""Attention over a cache of blocks, for any mix of prompt chunks and decodes: csrc/paged_attention.h.

T tokens of a step · H query heads · N blocks · K kv heads · B slots per block · D head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels.contract import ScoreRule
from batchinfer_kernels.cpu.library import TYPES, Functions, checked
from batchinfer_kernels.cpu.step_index import CPUStepIndex


def paged_attention(
    functions: Functions,
    q_THD: Tensor,
    kv_N2KBD: Tensor,
    index: CPUStepIndex,
    rule: ScoreRule,
    out_THD: Tensor | None = None,
) -> Tensor | None:
    """Return None, with nothing done, if q is not float32, has gaps within a head, or the cache is not dense."""
    kv_type = TYPES.get(kv_N2KBD.dtype)
    stride_T, stride_H, stride_D = q_THD.stride()
    if q_THD.dtype != torch.float32 or kv_type is None or stride_D != 1 or not kv_N2KBD.is_contiguous():
        return None
    tokens, heads, size = q_THD.shape
    _, _, kv_heads, block_size, _ = kv_N2KBD.shape
    if out_THD is None:
        out_THD = torch.empty(tokens, heads, size)
    scale, window, soft_cap = rule
    status = functions.paged_attention(
        q_THD.data_ptr(),
        stride_T,
        stride_H,
        out_THD.data_ptr(),
        kv_N2KBD.data_ptr(),
        kv_type,
        index.tables,
        index.table_stride,
        index.query_starts,
        index.lengths,
        index.prompts,
        index.num_sequences,
        heads,
        kv_heads,
        size,
        block_size,
        scale,
        window or 0,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
    checked(status)
    return out_THD
