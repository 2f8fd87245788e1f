"""Gated activations of the feed-forward block. F feed-forward size; leading axes are free."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(x_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def gelu_mul(x_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return F.gelu(gate_TF, approximate="tanh").mul_(up_TF)
