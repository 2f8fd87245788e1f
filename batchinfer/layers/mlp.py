"""Gated feed-forward block. T tokens, E hidden size, F feed-forward size."""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer_kernels.formats import Activation
from torch import Tensor, nn

from batchinfer.layers.linear import GatedLinear, Linear
from batchinfer.ops.backend import Backend

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
"""Hugging Face's name of an activation → that of `Backend.gated_linear`."""


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """Facts that all feed-forward blocks of a model share."""

    size: int
    activation: str  # a key of ACTIVATIONS
    bias: bool = False


class MLP(nn.Module):
    """Gated feed-forward block: down(activation(gate(x)) * up(x))."""

    def __init__(self, backend: Backend, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = GatedLinear(backend, hidden_size, config.size, ACTIVATIONS[config.activation], config.bias)
        self.down = Linear(backend, config.size, hidden_size, config.bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        y_TE: Tensor = self.down(self.gate_up(x_TE))
        return y_TE
