"""Linear layers. Several maps of one input are one parameter, stacked by rows: one GEMM, one read of the input.

State: the packed matrix, which stays with the backend that packed it, and a bias. A layer has no matrix before
`pack_weight`, and never holds it in another form.

N rows · I input features · O output features
"""

from __future__ import annotations

import torch
from batchinfer_kernels.formats import Activation, BlockMatrix, LinearWeights, PackedMatrix, Precision
from torch import Tensor, nn

from batchinfer.ops.backend import Backend


class Linear(nn.Module):
    """y = x Wᵀ + b. The bias is uninitialised: weights are always read from a file."""

    def __init__(self, backend: Backend, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.backend = backend
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: PackedMatrix | None = None

    def pack_weight(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> None:
        """Pack a weight that is already cut to the layer's shape; the layer keeps the packed form alone."""
        self._packed = self._pack(weight_OI, precision)

    def _pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return self.backend.pack(weight_OI, precision)

    @property
    def matrix(self) -> PackedMatrix:
        """Return the packed matrix [O, I]."""
        assert self._packed is not None, "a weight is packed before it is used"
        return self._packed

    @property
    def facts(self) -> LinearWeights:
        return LinearWeights(self.matrix, self.bias)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.backend.linear(x_NI, self.matrix, self.bias)


class StackedLinear(Linear):
    """Several maps of one input. `parts` are the output features of each, in the order in which the output has them."""

    def __init__(self, backend: Backend, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(backend, in_features, sum(parts), bias)
        self.parts = parts


class GatedLinear(StackedLinear):
    """A map to gates and one to what they multiply, and the multiplication: activation(x Gᵀ) * x Wᵀ."""

    def __init__(
        self, backend: Backend, in_features: int, size: int, activation: Activation, bias: bool = False
    ) -> None:
        super().__init__(backend, in_features, (size, size), bias)
        self.activation = activation

    def _pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        return self.backend.pack_gated(weight_OI, precision)

    @property
    def facts(self) -> LinearWeights:
        return LinearWeights(self.matrix, self.bias, self.activation)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.backend.gated_linear(x_NI, self.matrix, self.bias, self.activation)
