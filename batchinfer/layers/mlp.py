"""Gated feed-forward block. T tokens, E hidden size, F feed-forward size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from batchinfer import ops
from batchinfer.layers.linear import Linear, StackedLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu_mul,
    "swish": ops.silu_mul,
    "gelu_pytorch_tanh": ops.gelu_mul,
    "gelu_new": ops.gelu_mul,
}
"""Hugging Face's name of an activation → the gated op."""


@dataclass(frozen=True, slots=True)
class MLPConfig:
    size: int
    activation: str  # a key of ACTIVATIONS
    bias: bool = False


class MLP(nn.Module):
    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = StackedLinear(hidden_size, (config.size, config.size), config.bias)
        self.down = Linear(config.size, hidden_size, config.bias)
        self.activate_and_multiply = ACTIVATIONS[config.activation]

    def forward(self, x_TE: Tensor) -> Tensor:
        y_TE: Tensor = self.down(self.activate_and_multiply(self.gate_up(x_TE)))
        return y_TE
