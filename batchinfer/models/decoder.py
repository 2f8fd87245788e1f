"""The decoder of all dense families. What tells families apart are facts in ModelConfig.

T tokens of a step · N rows that come out · E hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from torch import Tensor, nn

from batchinfer import ops
from batchinfer.layers.attention import Attention, StepInputs
from batchinfer.layers.embedding import Embedding, logits
from batchinfer.layers.linear import Linear
from batchinfer.layers.mlp import MLP
from batchinfer.layers.norm import RMSNorm
from batchinfer.layers.rotary import Rotary
from batchinfer.models.config import LayerConfig, ModelConfig
from batchinfer.models.precision import WeightPrecision


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each a branch off the residual stream, with norms before, after or both."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        make_norm = partial(RMSNorm, eps=config.norm_eps, offset=config.family.norm_offset)

        def norm(name: str) -> RMSNorm | None:
            return make_norm(config.hidden_size) if name in config.family.norms else None

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(config.attention, config.hidden_size, make_norm, layer.window)
        self.attention_post_norm = norm("attention_post_norm")
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(config.mlp, config.hidden_size)
        self.mlp_post_norm = norm("mlp_post_norm")
        self.residual_multiplier = config.multipliers.residual

    def attend(
        self,
        x_TE: Tensor,
        residual_TE: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        kv_N2KBD: Tensor,
        index: ops.StepIndex,
    ) -> Tensor:
        """x is the branch before, not yet added to the residual, which changes in place. Returns attention's branch."""
        x_TE = _add(x_TE, residual_TE, self.attention_norm)
        return self._scaled(self.attention(x_TE, cos_sin, kv_N2KBD, index), self.attention_post_norm)

    def feed_forward(self, x_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """The same for the other branch."""
        return self._scaled(self.mlp(_add(x_TE, residual_TE, self.mlp_norm)), self.mlp_post_norm)

    def facts(self, rope: int | None) -> ops.LayerFacts:
        """`rope`: its number among the model's."""
        attention = self.attention

        def facts(norm: RMSNorm | None) -> ops.NormFacts | None:
            return None if norm is None else norm.facts

        return ops.LayerFacts(
            attention_norm=facts(self.attention_norm),
            q_norm=facts(attention.q_norm),
            k_norm=facts(attention.k_norm),
            attention_post_norm=facts(self.attention_post_norm),
            mlp_norm=facts(self.mlp_norm),
            mlp_post_norm=facts(self.mlp_post_norm),
            qkv=attention.qkv.facts,
            out=attention.out.facts,
            gate_up=self.mlp.gate_up.facts,
            down=self.mlp.down.facts,
            window=attention.rule.window,
            rope=rope,
        )

    def _scaled(self, x_TE: Tensor, norm: RMSNorm | None) -> Tensor:
        x_TE = x_TE if norm is None else norm(x_TE)
        return x_TE if self.residual_multiplier == 1.0 else x_TE.mul_(self.residual_multiplier)


def _add(x_TE: Tensor, residual_TE: Tensor, norm: RMSNorm | None) -> Tensor:
    return residual_TE.add_(x_TE) if norm is None else norm.after_adding(x_TE, residual_TE)


class Decoder(nn.Module):
    """Call it for hidden states of the rows that come out, `logits` for their logits. Weights: models.weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.multipliers.embedding)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.family.norm_offset)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size)
        self.rotaries = [Rotary(rope, config.context_tokens) for rope in config.ropes]
        self._at_once: ops.DecoderLayers | None = None

    def forward(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        """Computes the step's tokens, writes their keys and values into `caches` (one a layer). hidden_NE."""
        facts = inputs.query_starts_X, inputs.lengths_S, caches[0], inputs.prompt_S
        index = ops.step_index(inputs.slots_T, inputs.block_tables_SB, *facts)
        turns = [rotary.cos_sin(inputs.positions_T) for rotary in self.rotaries]
        x_TE = self.embedding(inputs.tokens_T)
        rows_N = inputs.output_rows_N
        at_once = self._at_once and ops.compute_layers(self._at_once, x_TE, turns, caches, index, rows_N)
        return self.norm.after_adding(*(at_once or self._one_by_one(x_TE, turns, caches, index, rows_N)))

    def _one_by_one(
        self,
        x_TE: Tensor,
        turns: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[Tensor],
        index: ops.StepIndex,
        rows_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The last branch, and the residual that it is to be added to."""
        residual_TE = x_TE.new_zeros(x_TE.shape)
        for layer, facts, kv_N2KBD in zip(self.layers, self.config.layers, caches, strict=True):
            cos_sin = None if facts.rope is None else turns[facts.rope]
            assert isinstance(layer, DecoderLayer)
            x_TE = layer.attend(x_TE, residual_TE, cos_sin, kv_N2KBD, index)
            if layer is self.layers[-1]:  # nothing reads the other rows any more
                x_TE, residual_TE = x_TE[rows_N], residual_TE[rows_N]
            x_TE = layer.feed_forward(x_TE, residual_TE)
        return x_TE, residual_TE

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """float32 [N, V]."""
        multipliers = self.config.multipliers
        return logits(hidden_NE, self._head, multipliers.logits_divisor, multipliers.logits_soft_cap)

    def largest_logits(self, hidden_NE: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of each row, and whose they are: the lowest token of equals. None where all logits are found as fast."""
        return None if self._screen is None else ops.linear_argmax(hidden_NE, self._screen)

    @cached_property
    def _screen(self) -> ops.ArgmaxBounds | None:
        """Made when it is first needed: where nothing is greedy it would be memory for nothing."""
        multipliers = self.config.multipliers
        if multipliers.logits_divisor != 1.0 or multipliers.logits_soft_cap is not None:  # they can make logits equal
            return None
        return ops.screen(self._head)

    @property
    def _head(self) -> ops.Packed | ops.Quantized:
        return (self.embedding if self.head is None else self.head).matrix

    def pack(self, precision: WeightPrecision) -> None:
        """Pack every matrix that is multiplied with, once the weights are read."""
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.pack(precision.layers)
        if self.head is not None:
            self.head.pack(precision.ends)
        if self.head is None or precision.ends != precision.activations:  # else rows are only looked up
            self.embedding.pack(precision.ends)
        attention = self.config.attention
        layers = zip(self.layers, self.config.layers, strict=True)
        facts = ops.DecoderFacts(
            layers=[layer.facts(config.rope) for layer, config in layers if isinstance(layer, DecoderLayer)],
            hidden_size=self.config.hidden_size,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_size=attention.head_size,
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            residual_multiplier=self.config.multipliers.residual,
        )
        self._at_once = ops.decoder_layers(facts, self.embedding.weight.device.type)
