"""What a decoder's layers are made of, as a backend needs to know it that computes them all in one call.

E hidden size · O, I output and input features · F feed-forward size · T tokens · R rotated pairs of a head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor


class NormFacts(NamedTuple):
    """As `rms_norm` takes it."""

    weight_E: Tensor
    eps: float
    offset: float


class LinearWeights(NamedTuple):
    """As `linear` takes it, or with an activation as `gated_linear` does."""

    matrix: Any  # in a form that the backend packed it into, or any other
    bias_O: Tensor | None
    activation: Literal["silu", "gelu"] | None = None


class LayerFacts(NamedTuple):
    """The norms are those before each branch, of queries and keys, and after each branch; None: there is none."""

    attention_norm: NormFacts | None
    q_norm: NormFacts | None
    k_norm: NormFacts | None
    attention_post_norm: NormFacts | None
    mlp_norm: NormFacts | None
    mlp_post_norm: NormFacts | None
    qkv: LinearWeights
    out: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    window: int | None
    rope: int | None  # its number among the model's


class DecoderFacts(NamedTuple):
    """`scale` and `soft_cap` are those of attention's scores."""

    layers: Sequence[LayerFacts]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    soft_cap: float | None
    residual_multiplier: float
