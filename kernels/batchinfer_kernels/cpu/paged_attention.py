"""Attention over a cache of blocks, for any mix of prompt chunks and decodes: csrc/paged_attention.h.

T tokens of a step · H query heads · N blocks · K kv heads · B slots per block · D head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.library import TYPES, checked, functions
from batchinfer_kernels.cpu.step_index import CPUStepIndex
from batchinfer_kernels.eager.step_index import StepIndex


def paged_attention(
    q_THD: Tensor,
    kv_N2KBD: Tensor,
    index: StepIndex,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out_THD: Tensor | None = None,
) -> Tensor:
    kv_type = TYPES.get(kv_N2KBD.dtype)
    stride_T, stride_H, stride_D = q_THD.stride()
    known = q_THD.dtype == torch.float32 and kv_type is not None
    dense = stride_D == 1 and kv_N2KBD.is_contiguous()
    if not (known and dense and isinstance(index, CPUStepIndex)):
        return eager.paged_attention(q_THD, kv_N2KBD, index, scale, window, soft_cap, out_THD)
    tokens, heads, size = q_THD.shape
    if out_THD is None:
        out_THD = torch.empty(tokens, heads, size)
    tables, query_starts, lengths, prompts = index.addresses
    status = functions().paged_attention(
        q_THD.data_ptr(),
        stride_T,
        stride_H,
        out_THD.data_ptr(),
        kv_N2KBD.data_ptr(),
        kv_type,
        tables,
        index.tables_SB.shape[1],
        query_starts,
        lengths,
        prompts,
        len(index.lengths_S),
        heads,
        index.num_kv_heads,
        size,
        index.block_size,
        scale,
        window or 0,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
    checked(status)
    return out_THD
