"""A runner that knows what the KV cache must hold: every slot remembers the whole prefix that it stands for.

It may be late, as a device is: a step is computed when it is collected, from what was sampled last at each seat.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from typing import Any

from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import IN_FLIGHT, Join, Reading, StepPlan, StepResult
from batchinfer.request import Constraint, Request, SamplingParams, TokenLogprob
from tests.harness import make_engine

VOCAB = 50
EOS = 0
NO_TOKEN = 10**9
POISON = (NO_TOKEN,)
COMPLETES, BREAKS = 1, 2  # random keys of requests whose answers end by a grammar, or with a failed row
REPEATS = 40  # a prompt that begins with it has an answer that mostly repeats itself


def next_token(context: list[int]) -> int:
    """Return the next token of the model after `context`; now and then it is the end of sequence."""
    if context[0] == REPEATS and len(context) > 9 and hash(tuple(context)) % 9:
        return context[-5]
    return hash(tuple(context)) % VOCAB


def completes(key: int, token: int) -> bool:
    """Return True if the token completes the answer of a request with this key by its grammar."""
    return key == COMPLETES and token % 7 == 3


def breaks(key: int, token: int) -> bool:
    """Return True if the row that samples this token for a request with this key fails."""
    return key == BREAKS and token % 7 == 4


def score(context: list[int], token: int) -> TokenLogprob:
    """Return the logprob of a token after `context`."""
    return TokenLogprob(token, -float(hash((*context, token)) % 997), ())


def state(context: list[int]) -> array[float]:
    """Return the hidden state at the last token of `context`."""
    return array("d", [hash((*context, axis)) % 1009 for axis in range(3)])


def _check(right: bool, wrong: str = "") -> None:
    if not right:
        raise Wrong(wrong)


class Wrong(BaseException):
    """A plan that is wrong: no failed step, from which an engine recovers."""


class CheckingRunner:
    """Writes all of a step's slots before any is read, as rope_kv_write precedes attention in every layer.

    Steps are computed in the order of their launches, when they are collected; until then the tokens that they sample
    must be IN_FLIGHT in later plans, and no others may be. Rows after the end of an answer are surplus: they write
    poison to their slots, and their results are poison. So are the slots of a failed step and of those after it.

    fail_if, fail_late: whether the launch of a plan raises `error`, or its collection.
    """

    def __init__(self, block_size: int, depth: int = 0) -> None:
        self.depth = depth
        self.prompts: dict[int, list[int]] = {}  # by seat, as of the last launch
        self.surplus_rows = 0
        self.launched_ahead = 0
        self.fail_if = self.fail_late = lambda plan: False
        self.error = RuntimeError("injected")
        self.poison: int | None = None
        self._block_size = block_size
        self._in_flight: deque[StepPlan] = deque()
        self._tables: dict[int, list[int]] = {}
        self._known: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}  # by seat: token sampled last
        self._over: set[int] = set()  # seats whose answer has ended
        self._joins: dict[int, Join] = {}
        self._slots: dict[int, tuple[int, ...] | None] = {}

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> StepPlan:
        _check(len(self._in_flight) <= self.depth, "more steps in flight than there may be")
        _check(len(set(plan.seats)) == len(plan.seats), "a seat is twice in a plan")
        self.prompts |= {join.seat: join.prompt for join in plan.joins}
        if self.fail_if(plan):
            raise self.error
        self._check_tokens_in_flight(plan)
        self.launched_ahead += len(self._in_flight) > 0
        self._in_flight.append(plan)
        return plan

    def collect(self, ticket: StepPlan) -> StepResult:
        _check(ticket is self._in_flight[0], "not the oldest step")
        if self.fail_late(ticket):
            raise self.error
        return self._compute(self._in_flight.popleft())

    def discard(self) -> None:
        for plan in self._in_flight:
            self._update_seats(plan)
            for seat, start, count in zip(plan.seats, plan.starts, plan.counts, strict=True):
                for position in range(start, start + count):
                    self._slots[self._slot(seat, position)] = POISON
        self._in_flight.clear()

    def _check_tokens_in_flight(self, plan: StepPlan) -> None:
        pending: set[int] = set()
        for step in self._in_flight:
            pending.difference_update(join.seat for join in step.joins)
            pending.update(seat for seat, samples in zip(step.seats, step.samples, strict=True) if samples)
        pending.difference_update(join.seat for join in plan.joins)
        at = 0
        for seat, count, samples in zip(plan.seats, plan.counts, plan.samples, strict=True):
            tokens, at = plan.tokens[at : at + count], at + count
            in_flight = tokens == [IN_FLIGHT] and samples == 1
            _check(in_flight == (seat in pending), "a token in flight is unknown, and no other")
            _check(in_flight or IN_FLIGHT not in tokens)

    def _update_seats(self, plan: StepPlan) -> None:
        for join in plan.joins:
            self._tables[join.seat] = []
            self._known[join.seat] = [*join.prompt, *join.output]
            self._joins[join.seat] = join
            self._over.discard(join.seat)
        for seat, first, blocks in plan.grown:
            table = self._tables[seat]
            _check(first == len(table), "a table grew with a gap")
            table.extend(blocks)

    def _compute(self, plan: StepPlan) -> StepResult:
        self._update_seats(plan)
        size = self._block_size
        held = [[self._slots.get(copy.source * size + slot) for slot in range(size)] for copy in plan.copies]
        for copy, prefixes in zip(plan.copies, held, strict=True):
            for slot, prefix in enumerate(prefixes):
                self._slots[copy.target * size + slot] = prefix
        at = 0
        for seat, start, count in zip(plan.seats, plan.starts, plan.counts, strict=True):
            tokens, at = plan.tokens[at : at + count], at + count
            if seat in self._over:
                self._slots[self._slot(seat, start)] = POISON
                continue
            if tokens == [IN_FLIGHT]:
                tokens = [self._last[seat]]
            known = self._known[seat]
            known.extend(tokens[len(known) - start :])  # after a preemption it knew the first, and now has a draft
            _check(known[start : start + count] == tokens, "wrong tokens in the plan")
            for position in range(start, start + count):
                self._slots[self._slot(seat, position)] = tuple(known[: position + 1])
        _check(at == len(plan.tokens))
        return self._sample(plan)

    def _sample(self, plan: StepPlan) -> StepResult:
        sampled: list[int] = []
        failed: dict[int, str] = {}
        ended: set[int] = set()
        for seat, start, count, samples in zip(plan.seats, plan.starts, plan.counts, plan.samples, strict=True):
            row = len(sampled)
            if seat in self._over:
                self.surplus_rows += 1
                _check(samples == 1)
                sampled.append(NO_TOKEN)
                failed |= {row: "surplus"} if seat % 2 else {}
                ended |= set() if seat % 2 else {row}
                continue
            known = self._known[seat]
            for position in range(start + count):
                prefix = self._slots.get(self._slot(seat, position))
                _check(prefix == tuple(known[: position + 1]), f"slot of position {position} holds another prefix")
            if samples:
                _check(start + count == len(known), "sampled before all known tokens were computed")
                sampled += [next_token(known[:end]) for end in range(len(known) - samples + 1, len(known) + 1)]
                right = self._drop_wrong(known, sampled[-samples:])
                for place, token in enumerate(sampled[row : row + right + 1], row):
                    if breaks(self._joins[seat].key, token):
                        failed[place] = "broken"
                    if completes(self._joins[seat].key, token):
                        ended.add(place)
                    if token in self._joins[seat].stop_ids or place in failed or place in ended:
                        self._over.add(seat)
                        break
                self._last[seat] = sampled[row + right]
        readings = self._readings(plan)
        self._over.update(
            plan.seats[read.place] for read, one in zip(plan.reads, readings, strict=True) if one.failure is not None
        )
        return StepResult(sampled, failed=failed, ended=frozenset(ended), readings=readings)

    def _drop_wrong(self, known: list[int], sampled: list[int]) -> int:
        """Remove the rejected tokens of a draft from the end of `known`. Return how many are right."""
        first = len(known) - len(sampled) + 1
        right = 0
        while first + right < len(known) and known[first + right] == sampled[right]:
            right += 1
        del known[first + right :]
        return right

    def _readings(self, plan: StepPlan) -> list[Reading]:
        _check([read.place for read in plan.reads] == sorted({read.place for read in plan.reads}))
        readings = []
        for index, first, count in plan.reads:
            start, computed = plan.starts[index], plan.counts[index]
            _check(count > 0 and start <= first and first + count <= start + computed, "a row is read, not computed")
            if plan.seats[index] in self._over and self._slots[self._slot(plan.seats[index], start)] is POISON:
                readings.append(Reading(failure="surplus"))
                continue
            known, join = self._known[plan.seats[index]], self._joins[plan.seats[index]]
            rows = range(first, first + count)
            if join.pooling is None:
                readings.append(Reading([score(known[: row + 1], known[row + 1]) for row in rows]))
            else:
                states = [state(known[: row + 1]) for row in rows]
                readings.append(Reading(hidden=array("d", map(sum, zip(*states, strict=True)))))
            if any(token == self.poison for token in known[first : first + count]):
                readings[-1] = Reading(failure="poisoned")
        return readings

    def _slot(self, seat: int, position: int) -> int:
        return self._tables[seat][position // self._block_size] * self._block_size + position % self._block_size


def naive(request: Request) -> list[int]:
    """Return the answer by the plainest loop: the specification of the engine."""
    context, output = list(request.prompt), []
    while len(output) < request.max_tokens:
        output.append(next_token(context))
        context.append(output[-1])
        if breaks(request.key, output[-1]):
            return output[:-1]
        if output[-1] in request.stop_ids or completes(request.key, output[-1]):
            break
        if request.stop_check is not None and request.stop_check(output[-1]):
            break
    return output


def naive_reading(request: Request) -> tuple[list[TokenLogprob | None] | None, array[float] | None]:
    """Return the reading of the prompt that the engine must give."""
    prompt = request.prompt
    scores, total = None, None
    if request.score_from is not None:
        scores = [
            None if place < request.score_from else score(prompt[:place], prompt[place]) for place in range(len(prompt))
        ]
    if request.pooling is not None:
        rows = {"mean": range(len(prompt)), "last": [len(prompt) - 1], "cls": [0]}[request.pooling]
        total = array("d", map(sum, zip(*(state(prompt[: row + 1]) for row in rows), strict=True)))
    return scores, total


def make_reading(request_id: int, prompt: list[int], max_tokens: int, **reads: object) -> Request:
    """Return a request that reads its prompt: score_from or pooling."""
    params = SamplingParams(temperature=0, prompt_logprobs=0)
    return Request(request_id, prompt, params, max_tokens, stop_ids=frozenset([EOS]), **reads)


def make_request(request_id: int, prompt: list[int], max_tokens: int) -> Request:
    return Request(request_id, prompt, SamplingParams(temperature=0), max_tokens, stop_ids=frozenset([EOS]))


def checking_engine(
    num_blocks: int, block_size: int = 4, *, depth: int = 0, **limits: Any
) -> tuple[Engine, CheckingRunner]:
    """Return an engine over a CheckingRunner; limits: those of `make_scheduler`."""
    runner = CheckingRunner(block_size, depth)
    return make_engine(runner, num_blocks, block_size, **limits), runner
