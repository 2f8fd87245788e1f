"""Lower bound of a model's linear layers: operations, weight bytes, and the time that a machine needs for them.

The limit of a step is the longer of two times: the operations of its linear layers at the measured GEMM rate, and one
read of their weights at the measured bandwidth. Weights count as stored (in 16 bits, say, if that is exact), and 8-bit
weights at the rate of 8-bit products. Attention, norms, sampling and host work take additional time in any engine, so
no run reaches the limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from batchinfer_kernels.formats import Precision

from batchinfer.bench.machine import Machine, weight_bandwidth
from batchinfer.layers.linear import Linear
from batchinfer.models.decoder import Decoder


class StepWork(NamedTuple):
    """One step: tokens computed, rows of the LM head, sequences, and seconds in the runner."""

    tokens: int
    sampled: int
    sequences: int
    seconds: float


@dataclass(frozen=True)
class LinearCost:
    """Weights of the linear layers of all decoder layers, and of the LM head, in numbers and bytes.

    `quantized`: the layers' weights have 8 bits. The head's never do.
    """

    layer_weights: int
    head_weights: int
    layer_bytes: int
    head_bytes: int
    quantized: bool = False

    @classmethod
    def of(cls, decoder: Decoder) -> LinearCost:
        """Count the weights of a decoder. A tied head is the embedding's matrix, used again."""
        layers = [module for module in decoder.layers.modules() if isinstance(module, Linear)]
        head = decoder.embedding if decoder.head is None else decoder.head
        return cls(
            sum(linear.in_features * linear.out_features for linear in layers),
            head.in_features * head.out_features,
            sum(linear.matrix.nbytes for linear in layers),
            head.matrix.nbytes,
            any(linear.matrix.precision is Precision.INT8 for linear in layers),
        )

    def operations(self, tokens: int, sampled: int) -> int:
        """Return one multiplication and one addition per weight: layers per token, head per sampled row."""
        return 2 * (self.layer_weights * tokens + self.head_weights * sampled)

    def weight_bytes(self, sampled: int) -> int:
        """Return the bytes that a step reads at least once; the head's only if a row needs it."""
        return self.layer_bytes + (self.head_bytes if sampled else 0)


class MachineRates(NamedTuple):
    """Rates of a machine per second: operations of the layers and of the LM head, and bytes of weights read."""

    layers: float
    head: float
    bytes: float

    @classmethod
    def of(cls, machine: Machine, cost: LinearCost) -> MachineRates:
        layers = (machine.int8_per_s if cost.quantized else None) or machine.gemm_per_s
        return cls(layers, machine.gemm_per_s, weight_bandwidth(machine, cost.weight_bytes(1)))


@dataclass(frozen=True)
class Limit:
    """Minimum seconds: of the operations alone, of the weights alone, and of the longer one in each step."""

    arithmetic_s: float
    weights_s: float
    seconds: float


def limit_of(cost: LinearCost, steps: Iterable[StepWork], rates: MachineRates) -> Limit:
    arithmetic = weights = both = 0.0
    for step in steps:
        computing = cost.operations(step.tokens, 0) / rates.layers + cost.operations(0, step.sampled) / rates.head
        reading = cost.weight_bytes(step.sampled) / rates.bytes
        arithmetic += computing
        weights += reading
        both += max(computing, reading)
    return Limit(arithmetic, weights, both)
