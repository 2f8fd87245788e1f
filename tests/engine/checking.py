"""A runner that knows what the KV cache must hold: every slot remembers the whole prefix that it stands for."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import Join, Reading, StepPlan, StepResult
from batchinfer.request import Constraint, Request, SamplingParams, TokenLogprob
from tests.harness import InstantRunner, make_engine

VOCAB = 50
EOS = 0
REPEATS = 40  # a prompt that begins with it has an answer that mostly repeats itself


def next_token(context: list[int]) -> int:
    """Return the next token of the model after `context`; now and then it is the end of sequence."""
    if context[0] == REPEATS and len(context) > 9 and hash(tuple(context)) % 9:
        return context[-5]
    return hash(tuple(context)) % VOCAB


def score(context: list[int], token: int) -> TokenLogprob:
    """Return the logprob of a token after `context`."""
    return TokenLogprob(token, -float(hash((*context, token)) % 997), ())


def state(context: list[int]) -> array[float]:
    """Return the hidden state at the last token of `context`."""
    return array("d", [hash((*context, axis)) % 1009 for axis in range(3)])


class CheckingRunner(InstantRunner):
    """Writes all of a step's slots before any is read, as rope_kv_write precedes attention in every layer."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[int, list[int]] = {}
        self._known: dict[int, list[int]] = {}
        self._joins: dict[int, Join] = {}
        self._slots: dict[int, tuple[int, ...] | None] = {}
        self.fail_if = lambda plan: False
        self.poison: int | None = None

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> StepResult:
        for join in plan.joins:
            self._tables[join.seat] = []
            self._known[join.seat] = [*join.prompt, *join.output]
            self._joins[join.seat] = join
        for seat, first, blocks in plan.grown:
            table = self._tables[seat]
            assert first == len(table), "a table grew with a gap"
            table.extend(blocks)
        if self.fail_if(plan):
            raise RuntimeError("injected")
        size = self._block_size
        held = [[self._slots.get(copy.source * size + slot) for slot in range(size)] for copy in plan.copies]
        for copy, prefixes in zip(plan.copies, held, strict=True):
            for slot, prefix in enumerate(prefixes):
                self._slots[copy.target * size + slot] = prefix
        assert len(set(plan.seats)) == len(plan.seats), "a seat is twice in a plan"
        at = 0
        for seat, start, count in zip(plan.seats, plan.starts, plan.counts, strict=True):
            tokens, at = plan.tokens[at : at + count], at + count
            known = self._known[seat]
            known.extend(tokens[len(known) - start :])  # after a preemption it knew the first, and now has a draft
            assert known[start : start + count] == tokens, "wrong tokens in the plan"
            for position in range(start, start + count):
                self._slots[self._slot(seat, position)] = tuple(known[: position + 1])
        assert at == len(plan.tokens)
        sampled = []
        for seat, start, count, samples in zip(plan.seats, plan.starts, plan.counts, plan.samples, strict=True):
            known = self._known[seat]
            for position in range(start + count):
                prefix = self._slots.get(self._slot(seat, position))
                assert prefix == tuple(known[: position + 1]), f"slot of position {position} holds another prefix"
            if samples:
                assert start + count == len(known), "sampled before all known tokens were computed"
                sampled += [next_token(known[:end]) for end in range(len(known) - samples + 1, len(known) + 1)]
                self._drop_wrong(known, sampled[-samples:])
        return StepResult(sampled, readings=self._readings(plan))

    def _drop_wrong(self, known: list[int], sampled: list[int]) -> None:
        """Remove the rejected tokens of a draft from the end of `known`."""
        first = len(known) - len(sampled) + 1
        right = 0
        while first + right < len(known) and known[first + right] == sampled[right]:
            right += 1
        del known[first + right :]

    def _readings(self, plan: StepPlan) -> list[Reading]:
        assert [read.place for read in plan.reads] == sorted({read.place for read in plan.reads})
        readings = []
        for index, first, count in plan.reads:
            start, computed = plan.starts[index], plan.counts[index]
            assert count > 0 and start <= first and first + count <= start + computed, "a row is read, not computed"
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
        if output[-1] in request.stop_ids:
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


def checking_engine(num_blocks: int, block_size: int = 4, **limits: Any) -> tuple[Engine, CheckingRunner]:
    """Return an engine over a CheckingRunner; limits: those of `make_scheduler`."""
    runner = CheckingRunner(block_size)
    return make_engine(runner, num_blocks, block_size, **limits), runner
