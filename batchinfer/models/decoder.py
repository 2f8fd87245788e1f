"""The decoder of all dense families. What tells families apart are facts in ModelConfig.

T tokens of a step · N rows that come out · E hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from batchinfer_kernels.contract import ArgmaxBounds, AttentionFacts, CosSin, LayerStack, StepIndex, StepInputs
from batchinfer_kernels.formats import DecoderFacts, LayerFacts, NormFacts
from torch import Tensor, nn

from batchinfer.layers.attention import Attention
from batchinfer.layers.embedding import Embedding, logits
from batchinfer.layers.linear import Linear
from batchinfer.layers.mlp import MLP
from batchinfer.layers.norm import RMSNorm
from batchinfer.layers.rotary import Rotary
from batchinfer.models.config import LayerConfig, ModelConfig
from batchinfer.ops.backend import Backend


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each a branch off the residual stream, with norms before, after or both."""

    def __init__(self, backend: Backend, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        make_norm = partial(RMSNorm, backend=backend, eps=config.norm_eps, offset=config.family.norm_offset)

        def norm(name: str) -> RMSNorm | None:
            return make_norm(config.hidden_size) if name in config.family.norms else None

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(backend, config.attention, config.hidden_size, make_norm, layer.window)
        self.attention_post_norm = norm("attention_post_norm")
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(backend, config.mlp, config.hidden_size)
        self.mlp_post_norm = norm("mlp_post_norm")
        self.residual_multiplier = config.multipliers.residual

    def attend(
        self,
        x_TE: Tensor,
        residual_TE: Tensor,
        cos_sin: CosSin | None,
        kv_N2KBD: Tensor,
        index: StepIndex,
    ) -> Tensor:
        """Return attention's branch. x is the branch before, which is added to the residual in place."""
        x_TE = _add(x_TE, residual_TE, self.attention_norm)
        return self._scaled(self.attention(x_TE, cos_sin, kv_N2KBD, index), self.attention_post_norm)

    def feed_forward(self, x_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """Return the feed-forward branch, with x and the residual as in `attend`."""
        return self._scaled(self.mlp(_add(x_TE, residual_TE, self.mlp_norm)), self.mlp_post_norm)

    def facts(self, rope: int | None) -> LayerFacts:
        """Return the layer as a backend reads it. `rope`: index among the model's rotary embeddings."""
        attention = self.attention

        def facts(norm: RMSNorm | None) -> NormFacts | None:
            return None if norm is None else norm.facts

        return LayerFacts(
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


class OpByOpLayers:
    """Layer stack that computes the layers' ops one by one: what every other form of the stack is equal to."""

    def __init__(self, layers: Sequence[DecoderLayer], ropes: Sequence[int | None]) -> None:
        """`ropes`: each layer's index among the model's rotary embeddings."""
        self._layers = layers
        self._ropes = ropes

    def run_layers(
        self, x_TE: Tensor, cos_sin: Sequence[CosSin], caches: Sequence[Tensor], index: StepIndex, rows_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See LayerStack."""
        residual_TE = x_TE.new_zeros(x_TE.shape)
        last = self._layers[-1]
        for layer, rope, kv_N2KBD in zip(self._layers, self._ropes, caches, strict=True):
            x_TE = layer.attend(x_TE, residual_TE, None if rope is None else cos_sin[rope], kv_N2KBD, index)
            if layer is last and rows_N is not None:  # nothing reads the other rows any more
                x_TE, residual_TE = x_TE[rows_N], residual_TE[rows_N]
            x_TE = layer.feed_forward(x_TE, residual_TE)
        return x_TE, residual_TE


class Decoder(nn.Module):
    """Call it for hidden states of the rows that come out, `logits` for their logits. Weights: models.weights.

    State: weights, in the forms of `backend`, and the layer stack that it gave for them once they were packed. Caches
    and step inputs are arguments; a step leaves nothing behind but keys and values.
    """

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        self.backend = backend
        self.config = config
        embedding = config.multipliers.embedding
        self.embedding = Embedding(backend, config.vocab_size, config.hidden_size, embedding, config.tied)
        self.layers = nn.ModuleList(DecoderLayer(backend, config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, backend, config.norm_eps, config.family.norm_offset)
        self.head = None if config.tied else Linear(backend, config.hidden_size, config.vocab_size)
        self.rotaries = [Rotary(rope, config.context_tokens, backend.device) for rope in config.ropes]
        windows = tuple(layer.window for layer in config.layers)
        self._attention = AttentionFacts(config.attention.num_heads, windows, self.dtype)
        self._stack: LayerStack | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations."""
        return self.norm.weight.dtype

    def forward(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        """Compute the step's tokens and write their keys and values into `caches` (one a layer). hidden_NE."""
        assert self._stack is not None, "weights are packed once they are read"
        index = self.prepare(inputs, caches)
        cos_sin = [rotary.cos_sin(inputs.positions_T) for rotary in self.rotaries]
        x_TE = self.embedding(inputs.tokens_T)
        branch_NE, residual_NE = self._stack.run_layers(x_TE, cos_sin, caches, index, inputs.output_rows_N)
        return self.norm.after_adding(branch_NE, residual_NE)

    def prepare(self, inputs: StepInputs, caches: Sequence[Tensor]) -> StepIndex:
        """Build the step's index, before the first layer."""
        return self.backend.prepare(inputs, caches[0], self._attention)

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """Return float32 [N, V]."""
        multipliers = self.config.multipliers
        return logits(hidden_NE, self._head, multipliers.logits_divisor, multipliers.logits_soft_cap)

    def largest_logits(self, hidden_NE: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return each row's largest logit and its token, the lowest of equals. None if `logits` is as fast."""
        return None if self._bounds is None else self.backend.linear_argmax(hidden_NE, self._bounds)

    @cached_property
    def _bounds(self) -> ArgmaxBounds | None:
        """Built when first needed: without greedy requests it would be memory for nothing."""
        multipliers = self.config.multipliers
        if multipliers.logits_divisor != 1.0 or multipliers.logits_soft_cap is not None:  # they can make logits equal
            return None
        return self.backend.argmax_bounds(self._head.matrix)

    @property
    def _head(self) -> Linear:
        return self.embedding if self.head is None else self.head

    def build_stack(self) -> None:
        """Let the backend choose the form of the layer stack, once every matrix is packed."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        ropes = [config.rope for config in self.config.layers]
        attention = self.config.attention
        facts = DecoderFacts(
            layers=[layer.facts(rope) for layer, rope in zip(layers, ropes, strict=True)],
            hidden_size=self.config.hidden_size,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_size=attention.head_size,
            scale=attention.scale,
            soft_cap=attention.soft_cap,
            residual_multiplier=self.config.multipliers.residual,
        )
        self._stack = self.backend.layer_stack(facts, OpByOpLayers(layers, ropes))
