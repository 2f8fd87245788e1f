"""Keys and values into their slots. T tokens, K kv heads, D head size, N blocks, B slots per block."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels import reference
from batchinfer_kernels.cpu.library import TYPES, functions
from batchinfer_kernels.cpu.step_index import CPUStepIndex
from batchinfer_kernels.reference.step_index import StepIndex


def kv_write(k_TKD: Tensor, v_TKD: Tensor, k_cache_NKBD: Tensor, v_cache_NKBD: Tensor, index: StepIndex) -> None:
    given, kept = TYPES.get(k_TKD.dtype), TYPES.get(k_cache_NKBD.dtype)
    known = given is not None and kept is not None and (given == kept or k_TKD.dtype == torch.float32)
    alike = v_TKD.dtype == k_TKD.dtype and v_cache_NKBD.dtype == k_cache_NKBD.dtype
    dense = k_TKD.stride(2) == v_TKD.stride(2) == 1 and k_cache_NKBD.is_contiguous() and v_cache_NKBD.is_contiguous()
    if not (known and alike and dense and isinstance(index, CPUStepIndex)):
        reference.kv_write(k_TKD, v_TKD, k_cache_NKBD, v_cache_NKBD, index)
        return
    functions().kv_write(
        k_TKD.data_ptr(),
        k_TKD.stride(0),
        k_TKD.stride(1),
        v_TKD.data_ptr(),
        v_TKD.stride(0),
        v_TKD.stride(1),
        given,
        k_cache_NKBD.data_ptr(),
        v_cache_NKBD.data_ptr(),
        kept,
        index.slots_T.data_ptr(),
        len(k_TKD),
        *k_cache_NKBD.shape[1:],
        torch.get_num_threads(),
    )
