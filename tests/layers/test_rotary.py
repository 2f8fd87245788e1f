"""Frequencies equal transformers' to the last bit, for every scaling."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batchinfer.layers.rotary import SCALINGS, RopeConfig, Rotary

ORIGINAL = {"original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}


@pytest.mark.parametrize(
    ("kind", "theta", "size", "scaling"),
    [
        ("linear", 1e4, 64, {"factor": 4.0}),
        ("llama3", 5e5, 128, LLAMA3),
        ("llama3", 5e5, 64, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}),
        ("yarn", 1e6, 128, {"factor": 4.0, **ORIGINAL}),
        ("yarn", 1e4, 64, {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, **ORIGINAL}),
        ("yarn", 1e4, 64, {"factor": 2.0, "attention_factor": 1.3, "beta_fast": 20, "beta_slow": 2, **ORIGINAL}),
        ("yarn", 1.5e5, 64, {"factor": 32.0, "truncate": False, **ORIGINAL}),
        ("yarn", 1e4, 8, {"factor": 1.0, **ORIGINAL}),
        ("dynamic", 1e4, 64, {"factor": 2.0}),
    ],
)
def test_scaled_frequencies_equal_transformers(kind, theta, size, scaling):
    config = LlamaConfig(
        hidden_size=size * 2,
        num_attention_heads=2,
        head_dim=size,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **scaling},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    rotary = Rotary(RopeConfig(size, theta, kind, scaling), 16384)
    torch.testing.assert_close(rotary.frequencies_R, expected, rtol=2e-7, atol=0)
    assert rotary.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("context", [4096, 4097, 131072])
@pytest.mark.parametrize("part", [1.0, 0.75])
def test_longrope_takes_one_set_of_factors_for_the_whole_context(context, part):
    pairs = int(96 * part) // 2
    factors = {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [2 + i * 1.5 for i in range(pairs)]}
    written = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": part, **factors}
    config = Phi3Config(
        hidden_size=192,
        num_attention_heads=2,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=written,
    )
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=context)
    rotary = Rotary(RopeConfig(2 * pairs, 1e4, "longrope", {"factor": 32.0, **ORIGINAL, **factors}), context)
    torch.testing.assert_close(rotary.frequencies_R, expected, rtol=2e-7, atol=0)
    assert rotary.factor == pytest.approx(factor, rel=1e-12)


def test_cos_and_sin_carry_the_attention_factor_and_far_positions():
    rotary = Rotary(RopeConfig(8, 1e4, "yarn", {"factor": 4.0, **ORIGINAL}), 16384)
    positions = torch.tensor([0, 1, 16383])
    cos, sin = rotary.cos_sin(positions)
    assert cos.shape == sin.shape == (3, 4)
    angles = positions[:, None].double() * rotary.frequencies_R.double()
    torch.testing.assert_close(cos.double(), angles.cos() * rotary.factor, atol=2e-3, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin() * rotary.factor, atol=2e-3, rtol=0)
    assert rotary.factor > 1.1


def test_every_scaling_names_what_it_needs():
    for kind, scaling in SCALINGS.items():
        values = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, **LLAMA3}
        Rotary(RopeConfig(8, 1e4, kind, {key: values[key] for key in scaling.needs}), 64)
