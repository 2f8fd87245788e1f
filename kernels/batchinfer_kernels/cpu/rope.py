"""Rotary position embedding, half-split pairs. T tokens, H heads, D head size, R rotated pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from batchinfer_kernels import reference
from batchinfer_kernels.cpu.library import functions


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    known = x_THD.dtype == cos_TR.dtype == sin_TR.dtype == torch.float32 and x_THD.stride(2) == 1
    if not (known and cos_TR.is_contiguous() and sin_TR.is_contiguous()):
        reference.rope(x_THD, cos_TR, sin_TR)
        return
    functions().rope(
        x_THD.data_ptr(),
        x_THD.stride(0),
        x_THD.stride(1),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        x_THD.shape[0],
        x_THD.shape[1],
        cos_TR.shape[1],
        torch.get_num_threads(),
    )
