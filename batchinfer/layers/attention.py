"""Attention over the paged cache: fused QKV, optional QK norm, rope or none, window, soft cap.

T tokens of a step · S sequences · N rows that come out, or blocks · B blocks per table, or slots per block ·
H query heads · K kv heads · C = H + 2K · D head size · E hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from batchinfer import ops
from batchinfer.layers.linear import Linear, StackedLinear
from batchinfer.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's flat batch. All tensors on the decoder's device; the arrays are on the host, so nothing ever syncs.

    Sequence s owns tokens query_starts_X[s] .. query_starts_X[s + 1] - 1: the last ones of its context, which has
    lengths_S[s] tokens, these included. Its context's position p lies in slot p % block_size of block
    block_tables[s, p // block_size]. Every sequence has at least one token here. Entries of a table beyond the
    context are never used, and may be anything.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64, block * block_size + offset: where the token's key and value go
    block_tables_SB: Tensor  # int32, B ≥ ceil(max(lengths_S) / block_size)
    query_starts_X: npt.NDArray[np.int64]  # [S + 1], from 0 to T
    lengths_S: npt.NDArray[np.int64]
    prompt_S: npt.NDArray[np.bool_]  # a part of a prompt, however short: computed alike however the prompt is cut
    output_rows_N: Tensor  # int64, indices into T: the rows whose hidden states come out


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
        config: AttentionConfig,
        hidden_size: int,
        make_norm: Callable[[int], RMSNorm],
        window: int | None = None,
    ) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.qkv = StackedLinear(hidden_size, (q_size, kv_size, kv_size), config.qkv_bias)
        self.out = Linear(q_size, hidden_size, config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = make_norm(config.head_size if per_head else q_size)
            self.k_norm = make_norm(config.head_size if per_head else kv_size)
        self.config = config
        self.rule = ops.ScoreRule(config.scale, window, config.soft_cap)

    def forward(
        self, x_TE: Tensor, cos_sin: tuple[Tensor, Tensor] | None, kv_N2KBD: Tensor, index: ops.StepIndex
    ) -> Tensor:
        """`cos_sin` None: this layer has no position embedding."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv_TCD = self.qkv(x_TE).unflatten(-1, (-1, self.config.head_size))
        q_THD, k_TKD, v_TKD = torch.split(qkv_TCD, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self._normed(self.q_norm, q_THD), self._normed(self.k_norm, k_TKD)
        ops.rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index)
        out_THD = ops.paged_attention(q_THD, kv_N2KBD, index, self.rule)
        out_TE: Tensor = self.out(out_THD.flatten(1))
        return out_TE

    def _normed(self, norm: RMSNorm, x_TCD: Tensor) -> Tensor:
        if self.config.qk_norm == "head":
            y_TCD: Tensor = norm(x_TCD)
            return y_TCD
        return norm(x_TCD.flatten(1)).view(x_TCD.shape)  # type: ignore[no-any-return]
