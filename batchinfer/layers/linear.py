"""Linear maps. Several maps of one input are one parameter, stacked by rows: one GEMM, one read of the input.

N rows · I input features · O output features
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchinfer import ops


class Linear(nn.Module):
    """y = x Wᵀ + b. Memory is uninitialised: weights are always read from a file."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: ops.Packed | ops.Quantized | None = None

    def pack(self, quantize: bool = False) -> None:
        """Once the weight is read: into the form that this machine multiplies with fastest. Gives back its memory."""
        if self._packed is None:
            self._keep(ops.pack_quantized(self.weight) if quantize else ops.pack_linear(self.weight))

    def take(self, blocks_OI: ops.BlockMatrix) -> None:
        """Instead of reading the weight and packing it."""
        self._keep(ops.pack_linear(blocks_OI))

    def _keep(self, packed: ops.Packed | ops.Quantized) -> None:
        self._packed = packed
        self.weight = nn.Parameter(self.weight.new_empty(0, self.in_features), requires_grad=False)

    @property
    def matrix(self) -> ops.Packed | ops.Quantized:
        """[O, I], packed or not."""
        return self.weight if self._packed is None else self._packed

    def forward(self, x_NI: Tensor) -> Tensor:
        return ops.linear(x_NI, self.matrix, self.bias)


class StackedLinear(Linear):
    """`parts` are the output features of each map, in the order in which the output has them."""

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias)
        self.parts = parts
