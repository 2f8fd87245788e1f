"""Gated activations of the feed-forward block. F feed-forward size; leading axes are free."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchinfer_kernels import eager
from batchinfer_kernels.cpu.library import Function, functions


def silu_mul(x_T2F: Tensor) -> Tensor:
    return _gated(functions().silu_mul, x_T2F) if _known(x_T2F) else eager.silu_mul(x_T2F)


def gelu_mul(x_T2F: Tensor) -> Tensor:
    return _gated(functions().gelu_mul, x_T2F) if _known(x_T2F) else eager.gelu_mul(x_T2F)


def _known(x_T2F: Tensor) -> bool:
    return x_T2F.dtype == torch.float32 and x_T2F.is_contiguous()


def _gated(function: Function, x_T2F: Tensor) -> Tensor:
    *leading, twice = x_T2F.shape
    out_TF = torch.empty(*leading, twice // 2)
    function(x_T2F.data_ptr(), math.prod(leading), twice // 2, out_TF.data_ptr(), torch.get_num_threads())
    return out_TF
