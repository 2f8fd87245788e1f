"""Tests of the cost of linear layers, against figures worked out by hand and against decoders with weights."""

from __future__ import annotations

import pytest
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.formats import Precision

from batchinfer.bench.cost import LinearCost, MachineRates, StepWork, limit_of
from batchinfer.layers.linear import Linear
from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from batchinfer.ops.resources import HOST
from tests.models.tiny import build

from .test_figures import make_machine


def test_cost_of_the_tiny_model_equals_hand_count(tiny_model):
    backend = EagerBackend(HOST)  # which adds no rows to fill a panel
    precisions = WeightPrecision(), WeightPrecision.of_all(Precision.BFLOAT16), WeightPrecision(layers=Precision.INT8)
    cost, half, eighth = (LinearCost.of(load_decoder(tiny_model, one, backend=backend)) for one in precisions)
    # hidden 32, 4 heads and 2 kv heads of 8, feed-forward 48, 4 layers, vocabulary 96
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 32 * (48 + 48) + 48 * 32
    assert (cost.layer_weights, cost.head_weights, cost.quantized) == (4 * layer, 32 * 96, False)
    assert cost.operations(tokens=10, sampled=3) == 2 * (10 * 4 * 7680 + 3 * 3072)
    assert cost.weight_bytes(sampled=1) == 4 * (30720 + 3072)
    assert cost.weight_bytes(sampled=0) == 4 * 30720
    assert half.weight_bytes(0) == 2 * 30720
    # a scale for every output feature; the head stays as it is
    outputs = 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert eighth.quantized and eighth.weight_bytes(0) == 30720 + 4 * outputs
    assert eighth.weight_bytes(1) - eighth.weight_bytes(0) == 4 * 3072


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2"])
def test_cost_equals_the_decoders_weights(name, tmp_path):
    build(name, tmp_path)
    decoder = load_decoder(tmp_path)
    cost = LinearCost.of(decoder)
    weights = [
        module.in_features * module.out_features for module in decoder.layers.modules() if isinstance(module, Linear)
    ]
    assert cost.layer_weights == sum(weights)
    assert cost.head_weights == decoder.embedding.in_features * decoder.embedding.out_features
    # a panel is filled up to its width, and numbers that 16 bits hold exactly are kept in 16
    assert 2 * cost.layer_weights <= cost.layer_bytes <= 8 * cost.layer_weights


def test_limit_takes_the_longer_time_of_each_step():
    cost = LinearCost(layer_weights=100, head_weights=50, layer_bytes=400, head_bytes=200)
    steps = [StepWork(tokens=64, sampled=0, sequences=1, seconds=9.0), StepWork(1, 1, 1, 9.0)]
    limit = limit_of(cost, steps, MachineRates(layers=1000.0, head=1000.0, bytes=100.0))
    assert limit.arithmetic_s == pytest.approx(12.8 + 0.3)
    assert limit.weights_s == pytest.approx(4.0 + 6.0)
    assert limit.seconds == pytest.approx(12.8 + 6.0)
    assert limit_of(cost, steps, MachineRates(4000.0, 1000.0, 100.0)).arithmetic_s == pytest.approx(3.2 + 0.05 + 0.1)
    assert limit_of(cost, [], MachineRates(1.0, 1.0, 1.0)).seconds == 0


def test_8_bit_layers_count_at_the_8_bit_rate(monkeypatch):
    monkeypatch.setattr("batchinfer.bench.cost.weight_bandwidth", lambda machine, size: float(size))
    machine = make_machine(gemm_per_s=10.0, int8_per_s=30.0)
    assert MachineRates.of(machine, LinearCost(1, 1, 4, 4)) == (10.0, 10.0, 8.0)
    assert MachineRates.of(machine, LinearCost(1, 1, 1, 4, quantized=True)) == (30.0, 10.0, 5.0)
