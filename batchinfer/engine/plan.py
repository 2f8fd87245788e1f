"""One step as a frozen value: what the scheduler decided, and what the runner answered.

A plan is all that crosses to other ranks. A running sequence holds a *seat*, a small integer that indexes the runner's
per-sequence tensors (block table, sampling parameters), so that a step carries only what changed: who took a seat
(`joins`), which blocks were appended to whose table (`grown`), and for each scheduled sequence the range of tokens to
compute. Replaying plans in order from the first rebuilds the same state. (Whole block tables in every plan cost the
host more than the rest of a step: 256 tables of 64 blocks are 16,384 integers.)

Shapes: S = sequences in the step, T = tokens in the step, N = positions that are sampled from.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batchinfer.errors import RowError
from batchinfer.request import Request, TokenLogprob


class Join(NamedTuple):
    """A sequence takes a seat. `output` are tokens that it generated before it was preempted (usually none)."""

    seat: int
    request: Request
    output: tuple[int, ...]


class Grown(NamedTuple):
    """`blocks` continue the block table of `seat` from block index `first`."""

    seat: int
    first: int
    blocks: tuple[int, ...]


class Copy(NamedTuple):
    """The content of block `target` begins as that of block `source` does: it is copied before the step computes."""

    source: int
    target: int


class PromptRead(NamedTuple):
    """The hidden states at positions `first .. first + rows - 1` of the plan's i-th sequence are read.

    What for, its request says: the logprobs of the prompt's tokens after them, or their sum (see Request.rows_read).
    """

    place: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward pass computes. Lists are parallel and never changed after construction.

    Sequence i computes positions `starts[i] .. starts[i] + counts[i] - 1`; its token ids are the next `counts[i]` of
    `tokens`. Its context is everything before, in the blocks of its seat. A token is sampled from each of
    the last `samples[i]` of these positions; the result has them in this order. With more than one the sequence
    computes its last known token and a draft, and `counts[i]` is `samples[i]`. `reads` are in the order of their
    sequences, at most one of each. `copies` come first, all sources being read before a target is written.
    """

    step: int
    joins: tuple[Join, ...]
    grown: tuple[Grown, ...]
    seats: list[int]  # [S]
    starts: list[int]  # [S]
    counts: list[int]  # [S]
    samples: list[int]  # [S]
    tokens: list[int]  # [T]
    reads: tuple[PromptRead, ...] = ()
    copies: tuple[Copy, ...] = ()


class Reading(NamedTuple):
    """What a read gave: a logprob for each row, or the sum of their hidden states. `failure` excludes both."""

    logprobs: Sequence[TokenLogprob] = ()
    hidden: array[float] | None = None
    failure: str | None = None


class StepResult(NamedTuple):
    """Sampled token ids [N], and for those whose sequences asked, logprobs [N] (None for the others).

    `failed` maps an index among the N to why nothing could be sampled there (its token is meaningless): the row's own
    error, or the reason of an engine failure. `ended` are indices whose answer this token completes, by its grammar.
    `readings` are parallel to the plan's reads.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    failed: dict[int, str | RowError] | None = None
    ended: frozenset[int] = frozenset()
    readings: Sequence[Reading] = ()
