"""Rotary frequencies and every scaling of them in use. T tokens, R rotated pairs of a head.

Frequencies are computed in float32 in the order of operations of the original implementations, so that angles at far
positions agree with theirs to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from batchinfer.ops.resources import HOST


@dataclass(frozen=True)
class RopeConfig:
    """`size` = 2R numbers of each head turn. `scaling` holds what SCALINGS[kind] needs, named as in config.json."""

    size: int
    theta: float
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)


class Rotary:
    """cos and sin for a step's positions, which are on `device`. `context_tokens`: the longest context in use."""

    def __init__(self, config: RopeConfig, context_tokens: int, device: torch.device = HOST) -> None:
        frequencies_R, self.factor = SCALINGS[config.kind].compute(config, context_tokens)
        self.frequencies_R = frequencies_R.to(device)

    def cos_sin(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 [T, R], times the scaling's attention factor."""
        angles_TR = positions_T[:, None].float() * self.frequencies_R
        cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
        if self.factor != 1.0:
            cos_TR.mul_(self.factor)
            sin_TR.mul_(self.factor)
        return cos_TR, sin_TR


def _exponents(config: RopeConfig) -> Tensor:
    return torch.arange(0, config.size, 2, dtype=torch.int64, device=HOST).float() / config.size


def _default(config: RopeConfig, context_tokens: int) -> tuple[Tensor, float]:
    return 1.0 / config.theta ** _exponents(config), 1.0


def _linear(config: RopeConfig, context_tokens: int) -> tuple[Tensor, float]:
    return _default(config, context_tokens)[0] / config.scaling["factor"], 1.0


def _llama3(config: RopeConfig, context_tokens: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    s = config.scaling
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    original = s["original_max_position_embeddings"]
    frequencies_R = _default(config, context_tokens)[0]
    wavelengths_R = 2 * math.pi / frequencies_R
    ramp_R = (original / wavelengths_R - low) / (high - low)
    mixed_R = (1 - ramp_R) * frequencies_R / factor + ramp_R * frequencies_R
    scaled_R = torch.where(wavelengths_R > original / low, frequencies_R / factor, mixed_R)
    return torch.where(wavelengths_R < original / high, frequencies_R, scaled_R), 1.0


def _yarn(config: RopeConfig, context_tokens: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolates slow frequencies, keeps fast ones, a ramp between."""
    s = config.scaling
    factor, original = s["factor"], s["original_max_position_embeddings"]

    def pair_with(rotations: float) -> float:
        return config.size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(s.get("beta_fast") or 32), pair_with(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.size - 1)
    if low == high:
        high += 0.001
    ramp_R = ((torch.arange(config.size // 2, dtype=torch.float32, device=HOST) - low) / (high - low)).clamp(0, 1)
    steps_R = config.theta ** _exponents(config)
    frequencies_R = 1.0 / (factor * steps_R) * ramp_R + 1.0 / steps_R * (1 - ramp_R)
    return frequencies_R, _yarn_attention_factor(s)


def _yarn_attention_factor(s: Mapping[str, Any]) -> float:
    def growth(multiplier: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * multiplier * math.log(s["factor"]) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return growth(s["mscale"]) / growth(s["mscale_all_dim"])
    return growth(1.0)


def _longrope(config: RopeConfig, context_tokens: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024). One set of factors for all contexts: the long one if any may exceed the original.

    Phi-3's own code changes sets with the length of each batch, which would make a row's tokens depend on its
    neighbours and leaves cached keys of the other set behind.
    """
    s = config.scaling
    original, factor = s["original_max_position_embeddings"], s["factor"]
    factors = s["long_factor"] if context_tokens > original else s["short_factor"]
    frequencies_R = 1.0 / (torch.tensor(factors, dtype=torch.float32, device=HOST) * config.theta ** _exponents(config))
    if s.get("attention_factor") is not None:
        return frequencies_R, float(s["attention_factor"])
    return frequencies_R, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


@dataclass(frozen=True)
class Scaling:
    """Computation of one kind of scaling."""

    compute: Callable[[RopeConfig, int], tuple[Tensor, float]]  # frequencies_R and the factor of cos and sin
    needs: tuple[str, ...] = ()  # keys of RopeConfig.scaling


SCALINGS: dict[str, Scaling] = {
    "default": Scaling(_default),
    "dynamic": Scaling(_default),  # scales beyond the configured context only, where we never go
    "linear": Scaling(_linear, ("factor",)),
    "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": Scaling(_yarn, ("factor", "original_max_position_embeddings")),
    "longrope": Scaling(_longrope, ("factor", "short_factor", "long_factor", "original_max_position_embeddings")),
}
