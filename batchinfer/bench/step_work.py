"""Bytes and operations of each op in a step, counted from a model's configuration and the step's plan.

Bytes are the unavoidable ones of each op as this engine divides a forward pass: its weights once, its inputs once, its
outputs once. Decode attention reads the keys and values of each sequence's context, prompt attention those of each
chunk's. Operations count a multiplication and an addition as two; norms, rope, activations and sampling count bytes
alone.

T tokens of a step · N sampled rows · E hidden size · F feed-forward size · H query heads · K kv heads · D head size
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.plan import StepPlan
from batchinfer.models.config import ModelConfig

OPS = (
    "qkv",
    "decode attention",
    "prompt attention",
    "out",
    "gate_up",
    "down",
    "norms, rope, activation",
    "LM head",
    "sampling",
)
_LOGIT = 4  # bytes: logits are float32 whatever the model computes in

Integers = NDArray[np.int64]


class Formats(NamedTuple):
    """Bytes of one number, and dtypes of the products.

    `weight`: of the layers' matrices. The LM head has the activations' format, as has attention's product.
    """

    weight: int
    activation: int
    kv: int
    linear_dtype: str
    activation_dtype: str


class OpWork(NamedTuple):
    """Work of one op in one step: bytes from memory, bytes passed from and to other ops, and operations in a dtype."""

    memory_bytes: float
    passed_bytes: float
    operations: float
    dtype: str


class StepTokens(NamedTuple):
    """Tokens and sampled rows of a plan, and by sequence the contexts of decodes and the chunks of prompts.

    A decode is a sequence with one token in the step. A chunk's tokens follow `starts` tokens in the cache.
    """

    tokens: int
    sampled: int
    decode_lengths: Integers
    starts: Integers
    counts: Integers

    @classmethod
    def of_plan(cls, plan: StepPlan) -> StepTokens:
        starts, counts = np.array(plan.starts), np.array(plan.counts)
        chunk = counts > 1
        return cls(len(plan.tokens), sum(plan.samples), starts[~chunk] + 1, starts[chunk], counts[chunk])


class ModelWork:
    """Counts of a model in given formats."""

    def __init__(self, config: ModelConfig, formats: Formats) -> None:
        attention, hidden = config.attention, config.hidden_size
        queries, pairs = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size
        self.formats = formats
        self._layers = len(config.layers)
        self._windows = Counter(layer.window for layer in config.layers)
        self._hidden, self._vocabulary = hidden, config.vocab_size
        self._queries, self._pairs = queries, pairs
        self._linears = {
            "qkv": (hidden, queries + 2 * pairs),
            "out": (queries, hidden),
            "gate_up": (hidden, 2 * config.mlp.size),
            "down": (config.mlp.size, hidden),
        }
        self._head_copies = 1 if config.tied else 2
        self._passed_per_token = self._element_wise(config)

    @property
    def layer_weights(self) -> int:
        return self._layers * sum(inputs * outputs for inputs, outputs in self._linears.values())

    @property
    def weights(self) -> int:
        """Return the numbers in all matrices, embedding included."""
        return self.layer_weights + self._head_copies * self._hidden * self._vocabulary

    @property
    def weight_bytes(self) -> int:
        formats = self.formats
        return self.layer_weights * formats.weight + (self.weights - self.layer_weights) * formats.activation

    def works(self, step: StepTokens) -> dict[str, OpWork]:
        """Return the work of each op in a step, in the order of OPS."""
        formats, tokens, rows = self.formats, step.tokens, step.sampled
        works = {name: self._linear(tokens, *shape) for name, shape in self._linears.items()}
        works["decode attention"] = self._decode_attention(step.decode_lengths)
        works["prompt attention"] = self._prompt_attention(step.starts, step.counts)
        written = 2 * self._layers * self._pairs * formats.kv
        embedded = tokens * self._hidden * formats.activation
        passed = tokens * self._passed_per_token + 4 * rows * self._hidden * formats.activation
        works["norms, rope, activation"] = OpWork(tokens * written + embedded, passed, 0, formats.activation_dtype)
        head = self._hidden * self._vocabulary
        logits = rows * self._vocabulary * _LOGIT
        works["LM head"] = OpWork(
            head * formats.activation if rows else 0,
            rows * self._hidden * formats.activation + logits,
            2 * rows * head,
            formats.activation_dtype,
        )
        works["sampling"] = OpWork(0, logits, 0, formats.activation_dtype)
        return {name: works[name] for name in OPS}

    def _element_wise(self, config: ModelConfig) -> int:
        """Return the bytes that norms, rope and activations of all layers read and write for one token.

        The residual is read and written by the norm before each branch, or by an addition; keys and values are written
        to the cache, which counts apart.
        """
        hidden, branches = config.hidden_size, 0
        for before, after in (("attention_norm", "attention_post_norm"), ("mlp_norm", "mlp_post_norm")):
            branches += 4 * hidden if before in config.family.norms else 3 * hidden
            branches += 2 * hidden if after in config.family.norms else 0
        heads = self._queries + self._pairs
        normed = 2 * heads if config.attention.qk_norm else 0
        turned = 2 * self._queries + 2 * self._pairs  # queries read and written, keys and values read
        activated = 3 * config.mlp.size
        return self._layers * self.formats.activation * (branches + normed + turned + activated)

    def _linear(self, tokens: int, inputs: int, outputs: int) -> OpWork:
        formats, weights = self.formats, self._layers * inputs * outputs
        passed = self._layers * tokens * (inputs + outputs) * formats.activation
        return OpWork(weights * formats.weight, passed, 2 * tokens * weights, formats.linear_dtype)

    def _decode_attention(self, lengths_S: Integers) -> OpWork:
        seen = sum(
            count * int(lengths_S.sum() if window is None else np.minimum(lengths_S, window).sum())
            for window, count in self._windows.items()
        )
        return self._attention(seen, seen, len(lengths_S))

    def _prompt_attention(self, starts_S: Integers, counts_S: Integers) -> OpWork:
        read = pairs = 0
        ends_S = starts_S + counts_S
        for window, layers in self._windows.items():
            longest_S = ends_S if window is None else np.minimum(ends_S, window + counts_S - 1)
            read += layers * int(longest_S.sum())
            # a token at position p sees p + 1 tokens, or the window: the first `growing` of a chunk see one more each
            growing_S = counts_S if window is None else np.clip(window - starts_S, 0, counts_S)
            pairs += layers * int((growing_S * starts_S + growing_S * (growing_S + 1) // 2).sum())
            pairs += 0 if window is None else layers * window * int((counts_S - growing_S).sum())
        return self._attention(read, pairs, int(counts_S.sum()))

    def _attention(self, read_tokens: int, pairs: int, queries: int) -> OpWork:
        """read_tokens: keys and values read, over all layers. pairs: of a query token and a key, over all layers."""
        formats = self.formats
        memory = 2 * read_tokens * self._pairs * formats.kv
        passed = 2 * self._layers * queries * self._queries * formats.activation
        return OpWork(memory, passed, 4 * pairs * self._queries, formats.activation_dtype)
