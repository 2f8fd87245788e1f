"""Keys and values into their slots. T tokens, K kv heads, D head size, N blocks, B slots per block."""

from __future__ import annotations

from torch import Tensor

from batchinfer_kernels.reference.step_index import StepIndex


def kv_write(k_TKD: Tensor, v_TKD: Tensor, k_cache_NKBD: Tensor, v_cache_NKBD: Tensor, index: StepIndex) -> None:
    blocks_T, offsets_T = index.write_T
    k_cache_NKBD[blocks_T, :, offsets_T] = k_TKD.to(k_cache_NKBD.dtype)
    v_cache_NKBD[blocks_T, :, offsets_T] = v_TKD.to(v_cache_NKBD.dtype)
