"""Values that cross between the engine and a backend: a step's inputs, score rules, capabilities, fallbacks.

`batchinfer.ops.backend` has the protocol that a backend satisfies.

T tokens of a step · S sequences · X = S + 1 · W blocks per table · N rows that come out, or blocks of the cache ·
K kv heads · E hidden size · R rotated pairs of a head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from batchinfer_kernels.formats import PackedMatrix

StepIndex = Any  # made by `prepare`; only the backend that made it reads it
ArgmaxBounds = Any  # made by `argmax_bounds`, likewise
CosSin = tuple[Tensor, Tensor]  # float32 [T, R] each
BlockNumbers = Sequence[int] | Tensor  # numbers of blocks: on the host, or int32 [C] on the device


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's flat batch: device tensors that a captured graph could read, and bounds as plain numbers.

    Sequence s owns tokens query_starts_X[s] .. query_starts_X[s + 1] - 1: the last tokens of its context, which has
    lengths_S[s] tokens, these included. Position p of its context lies in slot p % block_size of block
    block_tables_SW[s, p // block_size]. Every sequence has at least one token in the step. Table entries beyond the
    context are never used and may hold anything.

    Static buffers have padding at their ends: sequences without tokens, of length 0, which start where the tokens end,
    and tokens of no sequence in slot -1, whose keys and values go nowhere (or into the last block, which then belongs
    to no sequence) and whose hidden states are undefined.
    """

    tokens_T: Tensor  # int64 or int32, as all indices here
    positions_T: Tensor
    slots_T: Tensor  # block * block_size + offset: where the token's key and value go
    block_tables_SW: Tensor  # int32, W ≥ ceil(max_length / block_size)
    query_starts_X: Tensor  # from 0 to T
    lengths_S: Tensor
    prompt_S: Tensor  # bool: tokens of a prompt, however few: computed alike however the prompt is cut into chunks
    output_rows_N: Tensor | None  # indices into T: rows whose hidden states come out; None: all
    max_length: int  # upper bound of lengths_S
    seats_S: Tensor | None = None  # each sequence's row of block_tables_SW; None: sequence s has row s
    has_prompts: bool = True  # False promises: all sequences have at most `max_queries` tokens, and none is a prompt
    max_queries: int = 1  # other sequences than prompts are computed as decodes up to this many tokens


class AttentionFacts(NamedTuple):
    """Attention of all layers, as far as `prepare` needs it."""

    num_heads: int
    windows: tuple[int | None, ...]  # each layer's
    dtype: torch.dtype  # of queries


class ScoreRule(NamedTuple):
    """Attention score: (q · k) * scale, then soft_cap * tanh(score / soft_cap), then the mask.

    A token at position p sees positions p - window + 1 .. p; without a window 0 .. p.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Facts about a backend that code above it acts on."""

    name: str  # for logs and benchmarks
    exact_rows: bool  # a row's result does not depend on the rows beside it, to the last bit
    drafts_as_sequences: bool  # draft tokens are computed faster as sequences of one token each
    max_draft_rows: int  # rows of a step up to which verifying drafts pays
    slow_int8: str | None  # why products of 8-bit matrices are no faster than float32's; None: they are faster
    dtype_of_activations: bool = False  # engine.dtype is the dtype of activations too, by default the checkpoint's
    captures_graphs: bool = False  # a forward pass reads device memory alone and can be replayed as a graph


class LayerStack(Protocol):
    """All layers of a decoder, in one of several forms: op by op, fused, or a captured graph."""

    def run_layers(
        self, x_TE: Tensor, cos_sin: Sequence[CosSin], caches: Sequence[Tensor], index: StepIndex, rows_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the last branch and the residual it is yet to be added to, of `rows_N`, [N, E]. x_TE: embedding.

        `cos_sin` has one entry per rotary embedding, `caches` one per layer: kv_N2KBD, which the step's keys and values
        are written to. `rows_N` None: all rows come out, so that all shapes depend on T and S alone.
        """


class KVMemory(Protocol):
    """KV cache memory of all layers: kv_N2KBD of each, whose blocks hold keys first, then values."""

    @property
    def layers(self) -> list[Tensor]: ...

    def prefault(self, blocks: int) -> None:
        """Make the first `blocks` blocks ready to be written. Idempotent and cheap: called in every step."""


class Fallback(NamedTuple):
    """An op that a backend handed to a slower one, and the argument that it could not take."""

    op: str
    dtype: str
    shape: str
    why: str


Report = Callable[[Fallback], None]


class Fallbacks:
    """Reports each kind of fallback once: an op with the dtypes, or the reason, that it fell back for."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._seen: set[tuple[str, str, str]] = set()

    def note(self, op: str, why: str, *arguments: Tensor | PackedMatrix) -> None:
        """Report `op` unless it has fallen back for the same reason, with arguments of the same dtypes, before.

        All strides are one reason: theirs may change with every step.
        """
        dtypes = ", ".join(map(_type_name, arguments))
        kind = op, dtypes, why.partition(" (")[0]
        if kind not in self._seen:
            self._seen.add(kind)
            self._report(Fallback(op, dtypes, ", ".join(str(list(x.shape)) for x in arguments), why))


def _type_name(argument: Tensor | PackedMatrix) -> str:
    return str(argument.dtype).removeprefix("torch.") if isinstance(argument, Tensor) else argument.precision
