"""Root-mean-square norm, alone and after the residual addition. E features, N rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.library import functions
from batchinfer_kernels.cpu.memory import empty_rows


def rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    rows = _rows(x_NE)
    if rows is None or not _known(x_NE, weight_E):
        return eager.rms_norm(x_NE, weight_E, eps, offset)
    return _norm(x_NE, rows, None, weight_E, (eps, offset))


def add_rms_norm(x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float) -> Tensor:
    rows = _rows(x_NE)
    alike = residual_NE.dtype == torch.float32 and residual_NE.shape == x_NE.shape and residual_NE.is_contiguous()
    if rows is None or not alike or not _known(x_NE, weight_E):
        return eager.add_rms_norm(x_NE, residual_NE, weight_E, eps, offset)
    return _norm(x_NE, rows, residual_NE.data_ptr(), weight_E, (eps, offset))


def _norm(
    x_NE: Tensor,
    rows: tuple[int, int, int, int],
    residual: int | None,  # address
    weight_E: Tensor,
    eps_offset: tuple[float, float],
) -> Tensor:
    size = x_NE.shape[-1]
    out_NE = empty_rows(*x_NE.shape) if x_NE.dim() == 2 else torch.empty(x_NE.shape)
    functions().rms_norm(
        x_NE.data_ptr(),
        *rows,
        residual,
        weight_E.data_ptr(),
        size,
        *eps_offset,
        out_NE.data_ptr(),
        out_NE.stride(-2) if x_NE.dim() > 1 else size,
        torch.get_num_threads(),
    )
    return out_NE


def _known(x_NE: Tensor, weight_E: Tensor) -> bool:
    return x_NE.dtype == torch.float32 == weight_E.dtype and weight_E.is_contiguous()


def _rows(x_NE: Tensor) -> tuple[int, int, int, int] | None:
    """As two axes: lengths, then strides. None if they cannot be told so."""
    if x_NE.is_contiguous():
        return 1, math.prod(x_NE.shape[:-1]), 0, x_NE.shape[-1]
    if x_NE.dim() == 2 and x_NE.stride(1) == 1:
        return 1, x_NE.shape[0], 0, x_NE.stride(0)
    if x_NE.dim() == 3 and x_NE.stride(2) == 1:
        return x_NE.shape[0], x_NE.shape[1], x_NE.stride(0), x_NE.stride(1)
    return None
