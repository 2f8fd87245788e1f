"""Linear maps. Several maps of one input are one parameter, stacked by rows: one GEMM, one read of the input.

N rows · I input features · O output features
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from batchinfer import ops
from batchinfer.ops import Precision

Held = ops.Packed | ops.Quantized | ops.Gated


class Linear(nn.Module):
    """y = x Wᵀ + b. Memory is uninitialised: weights are always read from a file."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: Held | None = None

    def pack(self, precision: Precision) -> None:
        """Replace the weight, once it is read, by the form that its device multiplies with fastest."""
        if self._packed is None:
            self._keep(self._pack(self.weight, precision))

    def take(self, blocks_OI: ops.BlockMatrix) -> None:
        """Instead of reading the weight and packing it."""
        self._keep(self._pack(blocks_OI, Precision.FLOAT32))

    def _pack(self, weight_OI: Tensor | ops.BlockMatrix, precision: Precision) -> Held:
        return ops.pack_linear(weight_OI, precision)

    def _keep(self, packed: Held) -> None:
        self._packed = packed
        self.weight = nn.Parameter(self.weight.new_empty(0, self.in_features), requires_grad=False)

    @property
    def held(self) -> Held:
        """What there is of the weight, packed or not."""
        return self.weight if self._packed is None else self._packed

    @property
    def matrix(self) -> ops.Packed | ops.Quantized:
        """[O, I], packed or not."""
        held = self.held
        assert not isinstance(held, ops.Gated)
        return held

    @property
    def facts(self) -> ops.LinearWeights:
        return ops.LinearWeights(self.held, self.bias)

    def forward(self, x_NI: Tensor) -> Tensor:
        return ops.linear(x_NI, self.matrix, self.bias)


class StackedLinear(Linear):
    """`parts` are the output features of each map, in the order in which the output has them."""

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias)
        self.parts = parts


class GatedLinear(StackedLinear):
    """A map to gates and one to what they multiply, and the multiplication: activation(x Gᵀ) * x Wᵀ."""

    def __init__(self, in_features: int, size: int, activation: Literal["silu", "gelu"], bias: bool = False) -> None:
        super().__init__(in_features, (size, size), bias)
        self.activation = activation

    def _pack(self, weight_OI: Tensor | ops.BlockMatrix, precision: Precision) -> Held:
        return ops.pack_gated(weight_OI, precision)

    @property
    def facts(self) -> ops.LinearWeights:
        return ops.LinearWeights(self.held, self.bias, self.activation)

    def forward(self, x_NI: Tensor) -> Tensor:
        return ops.gated_linear(x_NI, self.held, self.bias, self.activation)
