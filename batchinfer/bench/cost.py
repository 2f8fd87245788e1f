"""What a model's linear layers must cost at least: operations and weight bytes, and the time that a machine needs.

The limit of a step is the longer of two times: the operations of its linear layers at the measured GEMM rate, and one
read of their weights at the measured bandwidth. Attention, norms, sampling and the host come on top in any engine, so
no run reaches the limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from batchinfer.layers.linear import Linear
from batchinfer.models.config import ModelConfig
from batchinfer.models.decoder import Decoder


class StepWork(NamedTuple):
    """One step: tokens computed, rows that reach the LM head, sequences, and seconds in the runner."""

    tokens: int
    sampled: int
    sequences: int
    seconds: float


@dataclass(frozen=True)
class LinearCost:
    """Weights of the linear layers of all decoder layers, and of the LM head, in numbers and bytes."""

    layer_weights: int
    head_weights: int
    bytes_per_weight: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> LinearCost:
        """From a decoder that has shapes and no memory. A tied head is the embedding's matrix, used again."""
        with torch.device("meta"):
            decoder = Decoder(config)
        layers = [module for module in decoder.layers.modules() if isinstance(module, Linear)]
        return cls(
            sum(linear.in_features * linear.out_features for linear in layers),
            config.hidden_size * config.vocab_size,
            dtype.itemsize,
        )

    def operations(self, tokens: int, sampled: int) -> int:
        """A multiplication and an addition for each weight: layers per token, head per sampled row."""
        return 2 * (self.layer_weights * tokens + self.head_weights * sampled)

    def weight_bytes(self, sampled: int) -> int:
        """What a step reads at least once; the head only if a row reaches it."""
        return self.bytes_per_weight * (self.layer_weights + (self.head_weights if sampled else 0))


@dataclass(frozen=True)
class Limit:
    """Least seconds: of the operations alone, of the weights alone, and of both, the longer counting in each step."""

    arithmetic_s: float
    weights_s: float
    seconds: float


def limit_of(cost: LinearCost, steps: Iterable[StepWork], gemm_per_s: float, bytes_per_s: float) -> Limit:
    arithmetic = weights = both = 0.0
    for step in steps:
        computing = cost.operations(step.tokens, step.sampled) / gemm_per_s
        reading = cost.weight_bytes(step.sampled) / bytes_per_s
        arithmetic += computing
        weights += reading
        both += max(computing, reading)
    return Limit(arithmetic, weights, both)
