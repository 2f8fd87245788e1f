"""What linear layers cost at least, against figures worked out by hand and against decoders with weights."""

from __future__ import annotations

import pytest
import torch

from batchinfer.bench.cost import LinearCost, StepWork, limit_of
from batchinfer.layers.linear import Linear
from batchinfer.models.config import load_config
from batchinfer.models.weights import load_decoder
from tests.models.tiny import build


def test_cost_of_the_tiny_model(tiny_model):
    cost = LinearCost.of(load_config(tiny_model), torch.float32)
    # hidden 32, 4 heads and 2 kv heads of 8, feed-forward 48, 4 layers, vocabulary 96
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 32 * (48 + 48) + 48 * 32
    assert (cost.layer_weights, cost.head_weights, cost.bytes_per_weight) == (4 * layer, 32 * 96, 4)
    assert cost.operations(tokens=10, sampled=3) == 2 * (10 * 4 * 7680 + 3 * 3072)
    assert cost.weight_bytes(sampled=1) == 4 * (30720 + 3072)
    assert cost.weight_bytes(sampled=0) == 4 * 30720
    assert LinearCost.of(load_config(tiny_model), torch.bfloat16).weight_bytes(0) == 2 * 30720


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2"])
def test_cost_is_that_of_the_weights(name, tmp_path):
    build(name, tmp_path)
    decoder = load_decoder(tmp_path, torch.float32)
    cost = LinearCost.of(decoder.config, torch.float32)
    weights = [
        module.in_features * module.out_features for module in decoder.layers.modules() if isinstance(module, Linear)
    ]
    assert cost.layer_weights == sum(weights)
    assert cost.head_weights == decoder.embedding.in_features * decoder.embedding.out_features


def test_limit_takes_the_longer_time_of_each_step():
    cost = LinearCost(layer_weights=100, head_weights=50, bytes_per_weight=4)
    steps = [StepWork(tokens=64, sampled=0, sequences=1, seconds=9.0), StepWork(1, 1, 1, 9.0)]
    limit = limit_of(cost, steps, gemm_per_s=1000.0, bytes_per_s=100.0)
    assert limit.arithmetic_s == pytest.approx(12.8 + 0.3)
    assert limit.weights_s == pytest.approx(4.0 + 6.0)
    assert limit.seconds == pytest.approx(12.8 + 6.0)
    assert limit_of(cost, [], 1.0, 1.0).seconds == 0
