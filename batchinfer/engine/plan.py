"""One step as frozen values: the plan that the scheduler made, and the result that the runner returned.

State: none; plans and results are never changed after construction. Owner: the scheduler builds plans, runners build
results. Flow: `Scheduler.schedule` → `StepPlan` → `StepRunner.launch` → `StepRunner.collect` → `StepResult` →
`Scheduler.update`. Failure: a runner that raises returns no result, and nothing of the plan counts.

A plan is plain data and all that crosses to other ranks: pickle it, replay the pickles in order from the first, and a
second runner holds the same state. It names no compiled grammar and no stop check. These are objects of the scheduler's
process: grammars reach the runner that samples as a second argument of `launch`, stop checks stay in the scheduler.

A running sequence holds a *seat*, a small integer that indexes the runner's per-sequence tensors (block table, sampling
parameters), so that a plan carries only deltas: the sequences that take a seat (`joins`), the blocks appended to block
tables (`grown`), and for each scheduled sequence the range of tokens to compute. (Whole block tables in every plan cost
the host more than the rest of a step: 256 tables of 64 blocks are 16,384 integers.)

Shapes: S = sequences in the step, T = tokens in the step, N = positions that are sampled from.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from batchinfer.errors import RowError
from batchinfer.request import Pooling, Request, SamplingParams, TokenLogprob

IN_FLIGHT = -1  # among the tokens of a plan: the one sampled last at this seat, by a step whose result is to come


class Join(NamedTuple):
    """A sequence takes a seat: what a runner needs of its request, as plain data.

    `output` are the tokens generated before a preemption (usually none). The other fields are those of `Request`.
    """

    seat: int
    output: tuple[int, ...]
    prompt: list[int]
    params: SamplingParams
    key: int
    stop_ids: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...]
    score_from: int | None
    pooling: Pooling | None

    @classmethod
    def of_request(cls, seat: int, request: Request, output: Sequence[int] = ()) -> Self:
        """Return the join of `request`, which has generated `output` so far, without its grammar and stop check."""
        return cls(
            seat,
            tuple(output),
            request.prompt,
            request.params,
            request.key,
            request.stop_ids,
            request.bad_words,
            request.score_from,
            request.pooling,
        )

    @property
    def reads_prompt(self) -> bool:
        """True if logprobs or hidden states of the prompt are read."""
        return self.score_from is not None or self.pooling is not None


class Grown(NamedTuple):
    """`blocks` continue the block table of `seat` from block index `first`."""

    seat: int
    first: int
    blocks: tuple[int, ...]


class Copy(NamedTuple):
    """A block copy before the forward pass: the content of block `source` becomes the beginning of block `target`."""

    source: int
    target: int


class PromptRead(NamedTuple):
    """A read of the hidden states at positions `first .. first + rows - 1` of the plan's i-th sequence (i = `place`).

    The sequence's `Join` says what for: logprobs of the prompt tokens after these positions, or the sum of the states.
    """

    place: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one forward pass. Lists are parallel and never changed after construction.

    Sequence i computes positions `starts[i] .. starts[i] + counts[i] - 1`; its token ids are the next `counts[i]` of
    `tokens`, IN_FLIGHT for one that a step in flight samples. Its context is everything before, in the blocks of its
    seat. A token is sampled from each of the last `samples[i]` of these positions; the result has them in this order.
    With more than one sample the sequence computes its last known token and a draft, and `counts[i]` is `samples[i]`.
    `reads` are in the order of their sequences, at most one per sequence. `copies` come first, and all sources are read
    before any target is written.
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
    """The result of a `PromptRead`: a logprob per row, or the sum of the hidden states. `failure` excludes both."""

    logprobs: Sequence[TokenLogprob] = ()
    hidden: array[float] | None = None
    failure: str | None = None


class StepResult(NamedTuple):
    """Sampled token ids [N], and logprobs [N] if any sequence asked (None for sequences that did not).

    `failed` maps an index among the N to the reason why no token could be sampled there (its token is meaningless): the
    row's own error, or the reason of an engine failure. `ended` are indices whose token completes the answer by its
    grammar. `readings` are parallel to the plan's reads.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    failed: dict[int, str | RowError] | None = None
    ended: frozenset[int] = frozenset()
    readings: Sequence[Reading] = ()
