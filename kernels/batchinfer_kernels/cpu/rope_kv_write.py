"""Rotary embedding and KV write in one pass over the tokens (csrc/ops.cpp).

T tokens, H query heads, K kv heads, D head size, R rotated pairs of a head, N blocks, B slots per block
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import TYPES, Functions
from batchinfer_kernels.cpu.step_index import CPUStepIndex


def rope_kv_write(
    functions: Functions,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    kv_N2KBD: Tensor,
    index: CPUStepIndex,
) -> bool:
    """Return False, with nothing done, for what is not float32 or has gaps within a head."""
    angles = cos_sin or ()
    float32 = all(x.dtype == torch.float32 for x in (q_THD, k_TKD, v_TKD, *angles))
    dense = q_THD.stride(2) == k_TKD.stride(2) == v_TKD.stride(2) == 1
    whole = all(x.is_contiguous() for x in (kv_N2KBD, *angles))
    kept = TYPES.get(kv_N2KBD.dtype)
    if not (float32 and dense and whole and kept is not None):
        return False
    cos, sin = (x.data_ptr() for x in cos_sin) if cos_sin is not None else (None, None)
    functions.rope_kv_write(
        *_place(q_THD),
        q_THD.shape[1],
        *_place(k_TKD),
        *_place(v_TKD),
        cos,
        sin,
        cos_sin[0].shape[1] if cos_sin is not None else 0,
        kv_N2KBD.data_ptr(),
        kept,
        index.slots,
        len(k_TKD),
        *kv_N2KBD.shape[2:],
        torch.get_num_threads(),
    )
    return True


def _place(x_THD: Tensor) -> tuple[int, int, int]:
    return x_THD.data_ptr(), x_THD.stride(0), x_THD.stride(1)
