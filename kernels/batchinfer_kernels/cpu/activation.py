"""Gated activations of the feed-forward block. F feed-forward size; leading axes are free."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import Function


def gated(function: Function, x_T2F: Tensor) -> Tensor | None:
    """Return what `silu_mul` or `gelu_mul` of the library computes; None if x is not dense float32."""
    if x_T2F.dtype != torch.float32 or not x_T2F.is_contiguous():
        return None
    *leading, twice = x_T2F.shape
    out_TF = torch.empty(*leading, twice // 2)
    function(x_T2F.data_ptr(), math.prod(leading), twice // 2, out_TF.data_ptr(), torch.get_num_threads())
    return out_TF
