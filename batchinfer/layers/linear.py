"""Linear maps. Several maps of one input are one parameter, stacked by rows: one GEMM, one read of the input.

I input features · O output features · any leading axes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ + b. Memory is uninitialised: weights are always read from a file."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x_I: Tensor) -> Tensor:
        return F.linear(x_I, self.weight, self.bias)


class StackedLinear(Linear):
    """`parts` are the output features of each map, in the order in which the output has them."""

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias)
        self.parts = parts
