"""Decode lanes: how sequences in them end, leave, come back and are preempted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.request import Finished, Request, SamplingParams, TokenLogprob
from tests.engine.checking import REPEATS, checking_engine, make_reading, make_request, naive
from tests.harness import InstantRunner, expect_short_answers, make_engine, run_requests

GREEDY = SamplingParams(temperature=0)


class Counting(InstantRunner):
    """Token 10 for the first row of every step, 11 for the second; `more` is the rest of a result."""

    def __init__(self, more: Callable[[int], dict[str, object]] = lambda step: {}) -> None:
        self._more = more
        self.decoded: list[list[int]] = []  # seats, by step
        self.tokens: list[int] = []  # computed, by step

    def launch(self, plan: StepPlan, constraints: object) -> StepResult:
        self.decoded.append([seat for seat, count in zip(plan.seats, plan.counts, strict=True) if count == 1])
        self.tokens.append(len(plan.tokens))
        return StepResult([10 + row for row in range(sum(plan.samples))], **self._more(plan.step))


def answers(runner: Counting, requests: Sequence[Request]) -> list[Finished]:
    engine = make_engine(runner, 99, 16, step_tokens=99)
    found = run_requests(engine, list(requests))
    return [found[request.request_id] for request in requests]


def request(number: int, max_tokens: int = 12, **more: object) -> Request:
    more.setdefault("params", GREEDY)
    return Request(number, [1, 2], max_tokens=max_tokens, **more)


@pytest.mark.parametrize(
    ("stop_ids", "lengths"), [(({10}, {11}), (1, 1)), (({12}, {11}), (12, 1)), (({11}, {12}), (12, 12))]
)
def test_a_sequence_ends_by_its_own_stop_ids_only(
    stop_ids: tuple[set[int], set[int]], lengths: tuple[int, int]
) -> None:
    """Another's stop id is just a token."""
    requests = [request(number, stop_ids=frozenset(ids)) for number, ids in enumerate(stop_ids)]
    assert tuple(len(answer.token_ids) for answer in answers(Counting(), requests)) == lengths


@pytest.mark.parametrize("ends_at", [1, 2, 3, 9])
def test_a_stop_check_sees_the_tokens_of_its_own_sequence(ends_at: int) -> None:
    seen: list[int] = []

    def check(token: int) -> bool:
        seen.append(token)
        return len(seen) == ends_at

    plain, checked = answers(Counting(), [request(0), request(1, stop_check=check)])
    assert checked.token_ids == seen == [11] * ends_at and checked.finish_reason == "stop"
    assert plain.token_ids == [10] * 12 and plain.finish_reason == "length"


def test_logprobs_go_to_the_sequences_that_asked() -> None:
    entry = TokenLogprob(11, -0.5, ())
    runner = Counting(lambda step: {"logprobs": [None, entry]})
    plain, asked = answers(runner, [request(0, 5), request(1, 4, params=SamplingParams(temperature=0, logprobs=0))])
    assert plain.logprobs is None and asked.logprobs == [entry] * 4


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_row_that_fails_ends_its_sequence_before_the_token(step: int) -> None:
    runner = Counting(lambda now: {"failed": {1: "broken"}} if now == step else {})
    sound, broken = answers(runner, [request(0), request(1)])
    assert sound.error is None and sound.token_ids == [10] * 12
    assert broken.finish_reason == "error" and broken.token_ids == [11] * (step - 1)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_token_that_completes_a_grammar_ends_its_sequence(step: int) -> None:
    runner = Counting(lambda now: {"ended": frozenset([1])} if now == step else {})
    going, complete = answers(runner, [request(0), request(1)])
    assert (going.finish_reason, complete.finish_reason) == ("length", "stop")
    assert complete.token_ids == [11] * step


def test_a_long_prompt_leaves_a_token_for_each_decoding_sequence() -> None:
    """A long prompt takes what is left of a step, whoever came first."""
    runner = Counting()
    engine = make_engine(runner, 99, seats=3, step_tokens=8)
    engine.add(Request(0, [1], GREEDY, 20))
    engine.step()
    engine.add(Request(1, list(range(60)), GREEDY, 2))
    engine.add(Request(2, [3], GREEDY, 20))
    for _ in range(6):
        engine.step()
        engine.scheduler.check_integrity()
    assert all(0 in seats for seats in runner.decoded), "it waited for another's prompt"
    assert max(runner.tokens) <= 8, "more than a step may have"


def test_a_decoding_sequence_can_be_preempted() -> None:
    """The newest sequence leaves a plan that it was in already, for the next block of an older one."""
    requests = [make_request(number, [1 + number, 2, 3], 30) for number in range(6)]
    engine, _ = checking_engine(20, 4)
    expect_short_answers(engine.scheduler)
    found = run_requests(engine, requests)
    assert engine.stats.preemptions > 0
    for one in requests:
        assert found[one.request_id].token_ids == naive(one)


def lengths_apart(count: int) -> list[Request]:
    """Answers of 1 to some 300 tokens, in any order."""
    return [make_request(number, [1 + number % 40, 2], 1 + 37 * number % 301) for number in range(count)]


@pytest.mark.parametrize("block_size", [1, 4, 512])
def test_a_sequence_that_leaves_the_decode_lanes_keeps_its_tokens(block_size: int) -> None:
    """So does the sequence that moves into the gap, however many steps neither has been visited."""
    requests = lengths_apart(40)
    engine, _ = checking_engine(20_000 // block_size, block_size)
    found = run_requests(engine, requests)
    assert {number: answer.token_ids for number, answer in found.items()} == {n.request_id: naive(n) for n in requests}


def test_a_sequence_leaves_its_lane_for_a_draft_and_comes_back() -> None:
    """With few sequences each may get a draft; the others decode side by side in the same step."""
    requests = [replace(one, prompt=[REPEATS, 3] if one.request_id % 2 else one.prompt) for one in lengths_apart(40)]
    engine, runner = checking_engine(1000, drafts=3, draft_rows=6)
    steps = []  # (sequences with one token, sequences with a draft)
    runner.fail_if = lambda plan: steps.append((plan.samples.count(1), sum(count > 1 for count in plan.samples)))
    found = {}
    for number, one in enumerate(requests):
        engine.add(one)
        for _ in range(60 if number % 8 == 7 else 2):
            found.update({answer.request.request_id: answer.token_ids for answer in engine.step().finished})
            engine.scheduler.check_integrity()
    found |= {number: answer.token_ids for number, answer in run_requests(engine, []).items()}
    assert found == {one.request_id: naive(one) for one in requests}
    assert engine.stats.accepted_tokens > 0
    kinds = {(decoding > 0, drafted > 0) for decoding, drafted in steps}
    assert kinds >= {(True, True), (True, False)}


def test_an_answer_is_found_again_up_to_its_last_computed_block() -> None:
    """By a longer conversation, whichever way it ended."""
    for length in range(1, 14):
        engine, _ = checking_engine(50)
        first = make_request(0, [1, 2, 3], length)
        answer = run_requests(engine, [first])[0].token_ids
        run_requests(engine, [make_request(1, [*first.prompt, *answer, 49, 49, 49, 49, 49], 1)])
        assert engine.stats.prompt_tokens_reused == (3 + len(answer) - 1) // 4 * 4, answer


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_sequence_already_in_the_plan_can_be_preempted(block_size: int) -> None:
    """Visits are in any order, so an older sequence may take the block of one that was visited already."""
    shuffle = random.Random(block_size).shuffle
    requests = [make_request(number, [1 + number, 2, 3], 2 + number % 11) for number in range(150)]
    engine, runner = checking_engine(24 // block_size, block_size)
    expect_short_answers(engine.scheduler)
    launch = runner.launch

    def only_who_runs_grows(plan: StepPlan, constraints: object) -> StepPlan:
        assert {grown.seat for grown in plan.grown} <= engine.scheduler.running.keys()
        for due in engine.scheduler._lanes._calendar.values():
            shuffle(due)
        return launch(plan, constraints)

    runner.launch = only_who_runs_grows
    found = run_requests(engine, requests)
    assert {number: answer.token_ids for number, answer in found.items()} == {n.request_id: naive(n) for n in requests}
    assert engine.stats.preemptions > 20


def test_a_reading_that_fails_ends_only_its_sequence_beside_a_decoding_one() -> None:
    engine, runner = checking_engine(50)
    plain, reading = make_request(0, [1, 2, 3], 20), make_reading(1, [7, 8, 9], 5, score_from=1)
    engine.add(plain)
    engine.step()
    engine.step()
    runner.poison = 8
    found = run_requests(engine, [reading])
    assert found[0].error is None and found[0].token_ids == naive(plain)
    assert found[1].finish_reason == "error" and "poisoned" in str(found[1].error)
