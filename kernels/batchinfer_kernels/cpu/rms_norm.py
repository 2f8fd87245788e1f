"""Root-mean-square norm, alone and after the residual addition. E features, N rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import Functions
from batchinfer_kernels.cpu.memory import empty_rows


def rms_norm(
    functions: Functions,
    x_NE: Tensor,
    residual_NE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    offset: float,
) -> Tensor | None:
    """Return the norm of x, or of the residual once x is added to it in place.

    None, with nothing done, if an argument is not float32 or has strides that C++ does not read.
    """
    rows = _rows(x_NE)
    if rows is None or x_NE.dtype != torch.float32 or weight_E.dtype != torch.float32 or not weight_E.is_contiguous():
        return None
    residual = None
    if residual_NE is not None:
        if residual_NE.dtype != torch.float32 or residual_NE.shape != x_NE.shape or not residual_NE.is_contiguous():
            return None
        residual = residual_NE.data_ptr()
    size = x_NE.shape[-1]
    out_NE = empty_rows(*x_NE.shape) if x_NE.dim() == 2 else torch.empty(x_NE.shape)
    functions.rms_norm(
        x_NE.data_ptr(),
        *rows,
        residual,
        weight_E.data_ptr(),
        size,
        eps,
        offset,
        out_NE.data_ptr(),
        out_NE.stride(-2) if x_NE.dim() > 1 else size,
        torch.get_num_threads(),
    )
    return out_NE


def _rows(x_NE: Tensor) -> tuple[int, int, int, int] | None:
    """Return lengths and strides of two axes of rows, None if the rows do not lie so."""
    if x_NE.is_contiguous():
        return 1, math.prod(x_NE.shape[:-1]), 0, x_NE.shape[-1]
    if x_NE.dim() == 2 and x_NE.stride(1) == 1:
        return 1, x_NE.shape[0], 0, x_NE.stride(0)
    if x_NE.dim() == 3 and x_NE.stride(2) == 1:
        return x_NE.shape[0], x_NE.shape[1], x_NE.stride(0), x_NE.stride(1)
    return None
