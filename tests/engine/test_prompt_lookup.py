"""Drafts: where they come from, when they pause, how they share a step, and that a step with one is still exact."""

from __future__ import annotations

import random

import pytest

from batchinfer.engine.plan import StepResult
from batchinfer.engine.prompt_lookup import Lookup
from batchinfer.engine.scheduler import Scheduler
from batchinfer.request import Request, SamplingParams
from tests.engine.checking import REPEATS, checking_engine, make_request, naive
from tests.harness import expect_short_answers, make_scheduler, run_requests


def test_a_draft_continues_the_most_recent_match() -> None:
    text = [1, 2, 3, 4, 70, 71, 9, 1, 2, 3, 4, 80, 81, 82, 9, 1, 2, 3, 4]
    assert Lookup(3).draft_tokens(text, 9) == [80, 81, 82]
    assert Lookup(8).draft_tokens(text, 2) == [80, 81]
    assert Lookup(4).draft_tokens([*text[:-1], 5], 4) == []
    assert Lookup(4).draft_tokens(text, 0) == Lookup(4).draft_tokens([1, 2, 3, 4], 4) == []


def test_a_match_that_reaches_the_end_repeats_itself() -> None:
    assert Lookup(5).draft_tokens([9, 7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]
    assert Lookup(3).draft_tokens([5] * 5, 3) == [5, 5, 5]
    assert Lookup(3).draft_tokens([5] * 4, 3) == []


def test_equal_bytes_that_are_not_tokens_are_no_match() -> None:
    """0x01010101 four times, one byte off: found, and passed over for the true place before it."""
    ones, shifted = 0x01010101, [0x01010100, *[0x01010101] * 3, 0x00000001]
    assert Lookup(2).draft_tokens([*shifted, 6, ones, ones, ones, ones], 2) == []
    assert Lookup(2).draft_tokens([*[ones] * 4, 33, 34, *shifted, 6, *[ones] * 4], 2) == [33, 34]


def test_matches_in_random_texts_equal_a_plain_loop() -> None:
    rng = random.Random(5)
    for _ in range(200):
        text, lookup = rng.choices([0, 1, 256, 65536], k=rng.randrange(1, 60)), Lookup(4)
        for _ in range(4):
            text += rng.choices([0, 1, 256], k=rng.randrange(1, 9))
            places = [place for place in range(len(text) - 4) if text[place : place + 4] == text[-4:]]
            wanted: list[int] = []
            for number in range(4 if places else 0):
                wanted.append([*text, *wanted][places[-1] + 4 + number])
            assert lookup.draft_tokens(text, 4) == wanted


def test_draft_length_follows_how_many_tokens_were_right() -> None:
    lookup, text = Lookup(8), [5] * 9
    lengths = []
    for accepted in (8, 3, 3, 0, 1, 2, 4, 8):
        length = len(lookup.draft_tokens(text, 99))
        lengths.append(length)
        lookup.judge_draft(length, min(accepted, length), len(text))
    assert lengths == [8, 8, 3, 6, 1, 2, 4, 8]
    lookup.judge_draft(len(lookup.draft_tokens(text, 2)), 2, len(text))
    assert len(lookup.draft_tokens(text, 99)) == 8, "a draft that had to be short says nothing against longer ones"


def test_wrong_drafts_pause_longer_and_longer() -> None:
    lookup, text = Lookup(2), [5] * 10
    asked = []
    while len(text) < 200:
        draft = lookup.draft_tokens(text, 2)
        if draft:
            asked.append(len(text))
            lookup.judge_draft(len(draft), 0, len(text) + 1)
        text.append(5)
    assert asked[:9] == [10, 11, 12, 29, 30, 31, 64, 65, 66] and asked[9] == 67 + 64
    lookup.judge_draft(1, 1, len(text))
    for _ in range(3):
        lookup.judge_draft(1, 0, len(text))
    assert not lookup.draft_tokens([*text, *[5] * 15], 2) and lookup.draft_tokens([*text, *[5] * 16], 2)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("caching", [True, False])
def test_tokens_are_those_without_drafts_in_fewer_steps(block_size: int, caching: bool) -> None:
    requests = [make_request(i, [REPEATS, 1, 2, 3 + i % 20], 60) for i in range(30)]
    steps = []
    for most in (0, 4):
        engine, _ = checking_engine(3000 // block_size, block_size, caching=caching, drafts=most)
        answers = run_requests(engine, requests)
        for request in requests:
            assert answers[request.request_id].token_ids == naive(request)
        assert engine.stats.generated_tokens == sum(len(answer.token_ids) for answer in answers.values())
        steps.append(engine.stats.steps)
    assert steps[1] < 0.7 * steps[0]
    assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens


def test_drafts_under_preemption_change_no_token() -> None:
    """They take none that others were promised or hold, and what is preempted is computed again as it was."""
    requests = [make_request(i, [REPEATS, 1, 2, 3 + i % 20, 4 + i % 3], 40) for i in range(60)]
    engine, _ = checking_engine(24, 4, drafts=4)
    expect_short_answers(engine.scheduler)
    answers = run_requests(engine, requests)
    assert engine.stats.preemptions > 0 and engine.stats.accepted_tokens > 0
    for request in requests:
        assert answers[request.request_id].token_ids == naive(request)


def repeating(number: int, max_tokens: int = 50, **more: object) -> Request:
    return Request(number, [5] * 6, SamplingParams(temperature=0), max_tokens, **more)


def started(seats: int, max_step_tokens: int, requests: list[Request]) -> Scheduler:
    """Return a scheduler after the step that computes the prompts; every sampled token is a five."""
    scheduler = make_scheduler(4 * seats, 64, seats=seats, step_tokens=max_step_tokens, drafts=4)
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting:
        scheduler.update(StepResult([5] * sum(scheduler.schedule().samples)))
    return scheduler


@pytest.mark.parametrize(
    ("sequences", "max_step_tokens", "lengths"),
    [
        (2, 999, [4, 4]),
        (40, 999, [2] * 40),
        (100, 999, [0] * 72 + [1] * 28),
        (128, 999, [0] * 128),
        (9, 20, [1] * 9),
    ],
)
def test_drafts_share_what_is_left_of_a_step(sequences: int, max_step_tokens: int, lengths: list[int]) -> None:
    scheduler = started(sequences, max_step_tokens, [repeating(number) for number in range(sequences)])
    plan = scheduler.schedule()
    assert [samples - 1 for samples in plan.samples] == lengths
    assert plan.counts == plan.samples and plan.tokens == [5] * sum(plan.counts)


def test_no_draft_goes_past_the_end_of_an_answer() -> None:
    scheduler = started(4, 99, [repeating(number, max_tokens=number + 2) for number in range(4)])
    assert scheduler.schedule().samples == [1, 2, 3, 4]


def test_rows_after_a_wrong_draft_token_do_not_count() -> None:
    """Nor does its failure; one that is reached ends the sequence."""
    scheduler = started(3, 99, [repeating(number) for number in range(3)])
    plan = scheduler.schedule()
    assert plan.samples == [5, 5, 5]
    rows = [5, 6, 5, 5, 5, 5, 5, 5, 5, 7, 5, 5, 5, 5, 5]
    scheduler.update(StepResult(rows, failed={2: "not reached", 12: "reached"}))
    scheduler.check_integrity()
    assert [sequence.output for sequence in scheduler.running.values()] == [[5, 5, 6], [5, 5, 5, 5, 5, 7]]
    ended = scheduler.take_finished()
    assert [(one.request.request_id, str(one.error), one.token_ids) for one in ended] == [(2, "reached", [5, 5, 5])]
    assert (scheduler.stats.draft_tokens, scheduler.stats.accepted_tokens) == (12, 1 + 4 + 2)
    plan = scheduler.schedule()
    assert (plan.starts, plan.counts, plan.tokens) == ([8, 11], [1, 1], [6, 7])


def test_a_stop_within_a_draft_ends_there() -> None:
    seen: list[int] = []

    def stop(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    scheduler = started(2, 99, [repeating(0, stop_check=stop), repeating(1, stop_ids=frozenset([6]))])
    assert scheduler.schedule().samples == [5, 5]
    scheduler.update(StepResult([5, 5, 5, 5, 5, 5, 6, 5, 5, 5]))
    answers = scheduler.take_finished()
    assert [(answer.token_ids, answer.finish_reason) for answer in answers] == [([5] * 4, "stop"), ([5, 5, 6], "stop")]
    assert seen == [5] * 4 and scheduler.stats.generated_tokens == 4 + 3


class _Grammar:
    """Any."""


@pytest.mark.parametrize(
    ("params", "more", "drafted"),
    [
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1, "logprobs": 3, "seed": 1}, {}, True),
        ({}, {"stop_ids": frozenset([9]), "stop_check": lambda token: False}, True),
        ({"repetition_penalty": 1.1}, {}, False),
        ({"presence_penalty": 0.1}, {}, False),
        ({"frequency_penalty": -0.1}, {}, False),
        ({"logit_bias": {1: 1.0}}, {}, False),
        ({"allowed_token_ids": [1, 5]}, {}, False),
        ({"min_tokens": 2}, {}, False),
        ({}, {"bad_words": ((1, 2),)}, False),
        ({}, {"constraint": _Grammar()}, False),
    ],
)
def test_only_stateless_requests_get_drafts(params: dict[str, object], more: dict[str, object], drafted: bool) -> None:
    request = Request(0, [5] * 6, SamplingParams(**params), 50, **more)
    assert started(1, 99, [request]).schedule().samples == [5 if drafted else 1]
