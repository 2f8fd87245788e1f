"""Attention over the paged cache: fused QKV, optional QK norm, rope or none, window, soft cap.

T tokens of a step · N blocks · B slots per block · H query heads · K kv heads · C = H + 2K · D head size ·
E hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from batchinfer_kernels.contract import CosSin, ScoreRule, StepIndex
from torch import Tensor, nn

from batchinfer.layers.linear import Linear, StackedLinear
from batchinfer.layers.norm import RMSNorm
from batchinfer.ops.backend import Backend


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Facts that all attention layers of a model share. `scale` multiplies q · k; `soft_cap` bounds the scores."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    soft_cap: float | None = None
    qk_norm: Literal["head", "projection"] | None = None  # over each head's numbers, or over all heads' together
    qkv_bias: bool = False
    out_bias: bool = False


class Attention(nn.Module):
    """One layer's attention, projections included."""

    def __init__(
        self,
        backend: Backend,
        config: AttentionConfig,
        hidden_size: int,
        make_norm: Callable[[int], RMSNorm],
        window: int | None = None,
    ) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.qkv = StackedLinear(backend, hidden_size, (q_size, kv_size, kv_size), config.qkv_bias)
        self.out = Linear(backend, q_size, hidden_size, config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = make_norm(config.head_size if per_head else q_size)
            self.k_norm = make_norm(config.head_size if per_head else kv_size)
        self.backend = backend
        self.config = config
        self.rule = ScoreRule(config.scale, window, config.soft_cap)

    def forward(self, x_TE: Tensor, cos_sin: CosSin | None, kv_N2KBD: Tensor, index: StepIndex) -> Tensor:
        """Return the attention branch. `cos_sin` None: this layer has no position embedding."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv_TCD = self.qkv(x_TE).unflatten(-1, (-1, self.config.head_size))
        q_THD, k_TKD, v_TKD = torch.split(qkv_TCD, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self._normed(self.q_norm, q_THD), self._normed(self.k_norm, k_TKD)
        self.backend.rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index)
        out_THD = self.backend.paged_attention(q_THD, kv_N2KBD, index, self.rule)
        out_TE: Tensor = self.out(out_THD.flatten(1))
        return out_TE

    def _normed(self, norm: RMSNorm, x_TCD: Tensor) -> Tensor:
        if self.config.qk_norm == "head":
            y_TCD: Tensor = norm(x_TCD)
            return y_TCD
        return norm(x_TCD.flatten(1)).view(x_TCD.shape)  # type: ignore[no-any-return]
