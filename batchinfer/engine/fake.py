"""FakeRunner: runs a plan without a model, so that everything around the engine can be tested and rehearsed.

State: per seat its join and where its answer ends. Owner: the engine. Its answers depend on the request alone: on the
prompt tokens, and for a request that samples, on its random key. The logprob of a prompt token depends on the token,
its position and the token before it.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchinfer.engine.plan import Join, PromptRead, Reading, StepPlan, StepResult
from batchinfer.request import MAX_LOGPROBS, Constraint, TokenLogprob

_STRIDE = 2654435761  # Knuth's multiplicative constant: neighbouring positions give unrelated tokens
_HIDDEN = 16  # numbers in a hidden state


@dataclass(frozen=True, slots=True)
class FakeAnswer:
    """Shape of fake answers: their length in tokens, [shortest, longest], and the ids that they consist of."""

    shortest: int
    longest: int
    vocabulary: Sequence[int]
    eos_id: int


class FakeRunner:
    """Answers every plan; `step_s` is how long a step takes, in seconds. A step is done when `launch` returns."""

    depth = 0

    def __init__(self, answer: FakeAnswer, step_s: float = 0.0) -> None:
        self._answer = answer
        self._step_s = step_s
        self._seats: dict[int, tuple[int, int]] = {}  # seat → (offset in the vocabulary, position of the end)
        self._joins: dict[int, Join] = {}  # by seat
        self._with_logprobs: set[int] = set()  # seats

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint] | None = None) -> StepResult:
        """Sample for every sequence that samples. Nothing is computed, and no grammar is followed."""
        if self._step_s:
            time.sleep(self._step_s)
        for join in plan.joins:
            self._seat_sequence(join)
        vocabulary, size, eos_id = self._answer.vocabulary, len(self._answer.vocabulary), self._answer.eos_id
        tokens = []
        for seat, start, count, samples in zip(plan.seats, plan.starts, plan.counts, plan.samples, strict=True):
            for end in range(start + count - samples + 1, start + count + 1):
                first, last = self._seats[seat]
                tokens.append(vocabulary[(first + end * _STRIDE) % size] if end != last else eos_id)
        logprobs = None if self._with_logprobs.isdisjoint(plan.seats) else self._logprobs(plan, tokens)
        readings = [self._read_prompt(self._joins[plan.seats[read.place]], read) for read in plan.reads]
        return StepResult(tokens, logprobs, readings=readings)

    def collect(self, ticket: StepResult) -> StepResult:
        """Return the result that `launch` returned."""
        return ticket

    def discard(self) -> None:
        """Do nothing: no step is in flight."""

    def _seat_sequence(self, join: Join) -> None:
        answer, prompt, seat = self._answer, len(join.prompt), join.seat
        seed = zlib.crc32(array("q", join.prompt).tobytes())
        if not join.params.greedy:
            seed = zlib.crc32(join.key.to_bytes(8, "little"), seed)
        length = answer.shortest + seed % (answer.longest - answer.shortest + 1)
        if answer.eos_id not in join.stop_ids or length <= join.params.min_tokens:
            length = 0  # no position is the end: the answer goes on to max_tokens
        self._seats[seat] = (seed - prompt * _STRIDE) % len(answer.vocabulary), prompt + length - 1
        self._joins[seat] = join
        (self._with_logprobs.discard if join.params.logprobs is None else self._with_logprobs.add)(seat)

    def _logprobs(self, plan: StepPlan, tokens: list[int]) -> list[TokenLogprob | None]:
        """Return logprob 0 for every sampled token, and -100 for other tokens that a request names."""
        entries: list[TokenLogprob | None] = []
        sampling = (seat for seat, samples in zip(plan.seats, plan.samples, strict=True) for _ in range(samples))
        for seat, token in zip(sampling, tokens, strict=True):
            params = self._joins[seat].params
            if params.logprobs is None:
                entries.append(None)
                continue
            shown = params.logprob_token_ids or ((token,) if params.logprobs else ())
            entries.append(TokenLogprob(token, 0.0, tuple((one, 0.0 if one == token else -100.0) for one in shown)))
        return entries

    def _read_prompt(self, join: Join, read: PromptRead) -> Reading:
        rows = range(read.first, read.first + read.rows)
        if join.pooling is None:
            return Reading([self._score_token(join, row + 1) for row in rows])
        seeds = [(join.prompt[row] + row) * _STRIDE for row in rows]
        return Reading(
            hidden=array("d", [sum((seed >> axis) % 201 - 100 for seed in seeds) for axis in range(_HIDDEN)])
        )

    def _score_token(self, join: Join, position: int) -> TokenLogprob:
        """Return the logprob of a prompt token. The best tokens are neighbours in the vocabulary, 0.1 apart."""
        vocabulary = self._answer.vocabulary
        token, before = join.prompt[position], join.prompt[position - 1]
        first = (before * _STRIDE + position) % len(vocabulary)
        count = min(MAX_LOGPROBS, len(vocabulary))
        best = [(vocabulary[(first + rank) % len(vocabulary)], -(rank + 1) / 10) for rank in range(count)]
        logprob = dict(best).get(token, -5.0 - (token * _STRIDE + position) % 100 / 10)
        return TokenLogprob(token, logprob, tuple(best[: join.params.prompt_logprobs or 0]))
