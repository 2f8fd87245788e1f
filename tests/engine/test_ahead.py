"""Steps planned and launched while the step before is in flight: each rule of it by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import IN_FLIGHT, StepPlan, StepResult
from batchinfer.engine.prompt_lookup import Lookup
from batchinfer.engine.scheduler import Scheduler
from batchinfer.errors import EngineError, OutOfDeviceMemory
from batchinfer.request import Request
from tests.engine.checking import (
    EOS,
    REPEATS,
    CheckingRunner,
    checking_engine,
    make_reading,
    make_request,
    naive,
    naive_reading,
)
from tests.harness import GREEDY, expect_short_answers, make_scheduler, never_stop, run_requests


def endless(request_id: int, prompt: list[int], max_tokens: int) -> Request:
    """Return a request whose answer only its length ends."""
    return Request(request_id, prompt, GREEDY, max_tokens)


def numbers_of(plan: StepPlan | None) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    assert plan is not None
    return plan.seats, plan.starts, plan.counts, plan.samples, plan.tokens


def launched_plans(runner: CheckingRunner) -> list[StepPlan]:
    """Return a list that collects the plans of the runner from now on."""
    plans: list[StepPlan] = []
    runner.fail_if = lambda plan: plans.append(plan)  # None: nothing fails
    return plans


def assert_right(engine: Engine, requests: list[Request]) -> None:
    answers = run_requests(engine, requests)
    for request in requests:
        assert answers[request.request_id].token_ids == naive(request)


def test_plans_ahead_are_as_written_here() -> None:
    """A prompt that ends, one that goes on, one that is admitted; an answer that ends by its length."""
    scheduler = make_scheduler(12, seats=3, step_tokens=8)
    scheduler.add(endless(0, [1, 2, 3, 4], 3))
    scheduler.add(endless(1, list(range(5, 21)), 2))
    assert numbers_of(scheduler.schedule()) == ([0, 1], [0, 0], [4, 4], [1, 0], list(range(1, 9)))
    plan = scheduler.schedule_ahead()
    assert numbers_of(plan) == ([0, 1], [4, 4], [1, 4], [1, 0], [IN_FLIGHT, 9, 10, 11, 12])
    assert plan is not None and [(grown.seat, grown.first) for grown in plan.grown] == [(0, 1), (1, 1)]
    scheduler.check_integrity()
    assert scheduler.update(StepResult([21])) == [0]
    scheduler.add(endless(2, [30, 31], 9))
    plan = scheduler.schedule_ahead()
    assert numbers_of(plan) == ([0, 1, 2], [5, 8, 0], [1, 4, 2], [1, 0, 1], [IN_FLIGHT, 13, 14, 15, 16, 30, 31])
    assert plan is not None and [join.seat for join in plan.joins] == [2]
    assert scheduler.update(StepResult([22])) == [] and 0 in scheduler.running
    plan = scheduler.schedule_ahead()  # the first answer ends with the step in flight
    assert numbers_of(plan) == ([2, 1], [2, 12], [1, 4], [1, 1], [IN_FLIGHT, 17, 18, 19, 20])
    scheduler.check_integrity()
    assert scheduler.update(StepResult([23, 24])) == [2]
    assert [(one.token_ids, one.finish_reason) for one in scheduler.take_finished()] == [([21, 22, 23], "length")]
    assert numbers_of(scheduler.schedule_ahead()) == ([2, 1], [3, 16], [1, 1], [1, 1], [IN_FLIGHT, IN_FLIGHT])


def test_an_answer_that_ends_by_its_length_has_no_surplus_row() -> None:
    engine, runner = checking_engine(200, depth=1)
    requests = [endless(number, [1 + number, 2], 1 + 3 * number % 14) for number in range(20)]
    assert_right(engine, requests)
    assert runner.surplus_rows == 0 and runner.launched_ahead > 0
    assert engine.stats.generated_tokens == sum(one.max_tokens for one in requests)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_step_of_steady_decoding_is_launched_ahead(depth: int) -> None:
    engine, runner = checking_engine(200, depth=depth)
    plans = launched_plans(runner)
    run_requests(engine, [endless(number, [1 + number, 2], 60) for number in range(8)])
    assert len(plans) == 60 and runner.launched_ahead == 59


@pytest.mark.parametrize("drafts", [0, 3])
def test_most_steps_of_a_mixed_workload_are_launched_ahead(drafts: int) -> None:
    """Arrivals, chunked prompts, shared prefixes, readings and early ends in a cache that has room."""
    engine, runner = checking_engine(400, seats=16, step_tokens=32, depth=1, drafts=drafts, draft_rows=8)
    plans = launched_plans(runner)
    for number in range(150):
        prompt = [1 + number % 5] * (number % 9) + list(range(number % 40 + 1))
        reads = {"score_from": 1} if number % 7 == 0 else {}
        engine.add(make_reading(number, prompt, 30, **reads))
        if number % 3 == 0:
            engine.step()
    run_requests(engine)
    assert runner.launched_ahead >= 0.95 * len(plans)
    assert runner.surplus_rows > 0


def test_no_surplus_token_is_counted_or_reported() -> None:
    """Tokens are reported when their step is collected, one step after its launch."""
    engine, runner = checking_engine(100, depth=1)
    requests = [make_request(number, [1 + number, 2, 3], 30) for number in range(12)]
    for request in requests:
        engine.add(request, subscribe=True)
    told: dict[int, list[int]] = {number: [] for number in range(12)}
    started: list[int] = []
    assert engine.step() == ([], [], {}), "the first step is in flight"
    while engine.has_work:
        output = engine.step()
        started += output.started
        for number, news in output.new_tokens.items():
            told[number] += news.token_ids
    assert told == {one.request_id: naive(one) for one in requests}
    assert sorted(started) == list(range(12)) and runner.surplus_rows > 0
    assert engine.stats.generated_tokens == sum(map(len, told.values()))


def test_seat_and_blocks_of_an_ended_sequence_are_reused_beside_its_surplus_row() -> None:
    """One seat: the surplus row is in the step before the one in which the next sequence joins."""
    engine, runner = checking_engine(8, seats=1, depth=1)
    plans = launched_plans(runner)
    assert_right(engine, [make_request(number, [1 + number, 2, 3], 25) for number in range(30)])
    assert runner.surplus_rows > 10 and len({join.seat for plan in plans for join in plan.joins}) == 1


def test_a_step_that_needs_a_preemption_waits_for_the_result() -> None:
    scheduler = make_scheduler(2, seats=2)
    expect_short_answers(scheduler)
    for number in range(2):
        scheduler.add(replace(endless(number, [1, 2, 3 + number], 9), stop_check=never_stop))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is not None, "there is a slot left in each block"
    scheduler.update(StepResult([11, 12]))
    assert scheduler.schedule_ahead() is None
    scheduler.check_integrity()
    scheduler.update(StepResult([13, 14]))
    assert scheduler.schedule().seats == [0] and scheduler.stats.preemptions == 1
    scheduler.check_integrity()


def test_a_prompt_without_free_blocks_waits_for_the_result() -> None:
    scheduler = make_scheduler(5, seats=2, step_tokens=8)
    expect_short_answers(scheduler)
    scheduler.add(replace(endless(0, [1, 2, 3, 4, 5, 6, 7], 9), stop_check=never_stop))
    scheduler.schedule()
    scheduler.update(StepResult([11]))
    scheduler.add(endless(1, list(range(20, 31)), 1))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is None, "two blocks for the prompt, one to decode; two are free"
    scheduler.check_integrity()
    scheduler.update(StepResult([12]))
    assert scheduler.schedule().seats == [0] and scheduler.stats.preemptions == 1


def speculating(prompt: list[int], **limits: int) -> Scheduler:
    """Return a scheduler whose only sequence has one step in flight."""
    scheduler = make_scheduler(50, drafts=3, **limits)
    scheduler.add(endless(0, prompt, 40))
    scheduler.schedule()
    return scheduler


def test_a_draft_that_may_be_wanted_waits_for_the_result() -> None:
    """Three of the four tokens that must match are known."""
    assert speculating([1, 2, 3, 9, 1, 2, 3]).schedule_ahead() is None
    assert speculating([1, 2, 3, 9, 1, 2, 4]).schedule_ahead() is not None
    assert speculating([1, 2, 3, 9, 1, 2, 3], draft_rows=1).schedule_ahead() is not None, "no room for a draft"


def test_a_draft_in_flight_waits_for_the_result_and_a_pause_does_not() -> None:
    scheduler = speculating([1, 2, 3, 4, 1, 2, 3])
    scheduler.update(StepResult([4]))
    for step in range(3):
        plan = scheduler.schedule()
        assert plan.samples == [4] if step == 0 else len(plan.tokens) > 1
        assert scheduler.schedule_ahead() is None
        wrong = [30 + step] + [0] * (plan.samples[0] - 1)
        scheduler.update(StepResult(wrong))
        for token in (1, 2, 3, 4):  # the pattern again
            scheduler.schedule()
            scheduler.update(StepResult([token]))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is not None, "three wrong drafts: a pause"


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30))
@settings(deadline=None)
def test_no_draft_is_missed_by_going_ahead(tokens: list[int]) -> None:
    """Without a match so far, no token in flight makes one; with one, some token does."""
    may = Lookup(4).may_draft(tokens, 1)
    drafts = [Lookup(4).draft_tokens([*tokens, token], 4) for token in (1, 2, 3)]
    assert may == any(drafts)


def test_steps_before_a_failed_launch_count() -> None:
    engine, runner = checking_engine(100, depth=1)
    request = make_request(0, [1, 2, 3], 9)
    engine.add(request, subscribe=True)
    engine.step()
    runner.fail_if = lambda plan: True
    output = engine.step()
    assert output.new_tokens[0].token_ids == naive(request)[:1] and not engine._tickets
    runner.fail_if = lambda plan: False
    assert engine.scheduler.running == {} and len(engine.scheduler.waiting) == 0
    assert output.finished[0].error is not None, "it failed alone"


def test_steps_after_a_failed_one_do_not_count() -> None:
    """Nor does what a device computed for them: all sequences join again."""
    engine, runner = checking_engine(100, depth=1)
    requests = [make_request(number, [1 + number, 2, 3], 30) for number in range(6)]
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    runner.fail_late = lambda plan: len(plan.seats) > 4
    output = engine.step()
    runner.fail_late = lambda plan: False
    engine.scheduler.check_integrity()
    assert not output.finished and not engine._tickets and not engine.scheduler.running
    answers = run_requests(engine)
    assert all(naive(one) == answers[one.request_id].token_ids for one in requests if one.request_id in answers)
    assert len(answers) >= 5


@pytest.mark.parametrize("where", ["fail_if", "fail_late"])
def test_a_sequence_that_fails_steps_in_flight_is_found_and_ends_alone(where: str) -> None:
    engine, runner = checking_engine(400, seats=16, step_tokens=200, depth=1)
    requests = [endless(number, [1 + number, 2, 3], 10) for number in range(40)]

    def has_the_culprit(plan: StepPlan) -> bool:
        ends = zip(plan.seats, plan.starts, plan.counts, strict=True)
        return any(runner.prompts[seat][0] == 18 and start + count > 4 for seat, start, count in ends)

    setattr(runner, where, has_the_culprit)
    answers = run_requests(engine, requests)
    for request in requests:
        assert (answers[request.request_id].error is not None) == (request.request_id == 17)
        assert request.request_id == 17 or answers[request.request_id].token_ids == naive(request)
    assert runner.launched_ahead > 10, "no longer than it searches does it wait for results"


def test_nothing_is_launched_ahead_while_a_sequence_at_fault_is_searched_for() -> None:
    scheduler = make_scheduler(100)
    for number in range(8):
        scheduler.add(endless(number, [1 + number, 2], 9))
    scheduler.schedule()
    scheduler.fail("injected")
    while scheduler._max_running < 8:
        plan = scheduler.schedule()
        assert scheduler.schedule_ahead() is None
        scheduler.update(StepResult([9] * sum(plan.samples)))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is not None


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["fail_if", "fail_late"])
def test_a_step_that_does_not_fit_is_redone_in_smaller_steps(depth: int, where: str) -> None:
    engine, runner = checking_engine(400, step_tokens=64, depth=depth)
    runner.error = OutOfDeviceMemory("512 MiB are free")
    setattr(runner, where, lambda plan: len(plan.tokens) > 20)
    assert_right(engine, [make_request(number, [1 + number, *range(30)], 9) for number in range(20)])
    assert 8 <= engine.scheduler.max_step_tokens <= 20
    assert engine.scheduler._max_running == 8, "nobody is suspected"


@pytest.mark.parametrize("depth", [0, 1])
def test_engine_gives_up_when_the_smallest_step_does_not_fit(depth: int) -> None:
    engine, runner = checking_engine(400, step_tokens=64, depth=depth)
    runner.error = OutOfDeviceMemory("nothing is free")
    runner.fail_late = lambda plan: True
    engine.add(make_request(0, list(range(40)), 3))
    with pytest.raises(EngineError, match=r"engine\.max_step_tokens or engine\.max_num_seqs: nothing is free"):
        run_requests(engine)


def test_aborted_sequences_leave_surplus_rows() -> None:
    """Their seats and blocks are free at once, and the others go on."""
    engine, _ = checking_engine(50, depth=1)
    requests = [endless(number, [1 + number, 2, 3], 20) for number in range(12)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    for number in range(0, 12, 2):
        assert engine.abort(number)
        engine.scheduler.check_integrity()
    answers = run_requests(engine)
    assert sorted(answers) == list(range(1, 12, 2))
    assert all(answers[number].token_ids == naive(requests[number]) for number in answers)
    engine.add(requests[0])
    engine.step()
    assert engine.abort(0) and engine.has_work, "its step is in flight"
    assert engine.step() == ([], [], {}) and not engine.has_work
    assert engine.scheduler.pool.num_free == 50


@pytest.mark.parametrize("step_tokens", [8, 1000])
@pytest.mark.parametrize("num_blocks", [12, 400])
def test_reads_planned_ahead_are_read_once_and_whole(step_tokens: int, num_blocks: int) -> None:
    kinds = [{"score_from": 1}, {"pooling": "mean"}, {"score_from": 4}, {"pooling": "last"}, {"pooling": "cls"}, {}]
    requests = [
        make_reading(number, [1 + number % 4, *range(4 + number % 17)], (0, 0, 14)[number % 3], **kinds[number % 6])
        for number in range(120)
        if kinds[number % 6] or number % 3 == 2
    ]
    engine, runner = checking_engine(num_blocks, step_tokens=step_tokens, depth=1)
    expect_short_answers(engine.scheduler)
    answers = run_requests(engine, requests)
    for request in requests:
        answer = answers[request.request_id]
        assert answer.token_ids == naive(request)
        assert (answer.prompt_logprobs, answer.hidden) == naive_reading(request)
    assert runner.launched_ahead > 0
    assert engine.stats.preemptions > 0 or num_blocks > 12


def test_reads_of_a_failed_step_and_of_those_after_it_are_planned_again() -> None:
    engine, runner = checking_engine(100, step_tokens=8, depth=1)
    request = make_reading(0, list(range(1, 60)), 0, score_from=1)
    for one in (endless(1, [3, 2], 30), request):
        engine.add(one)
    for _ in range(3):
        engine.step()
    runner.fail_late = lambda plan: True
    engine.step()
    runner.fail_late = lambda plan: False
    engine.scheduler.check_integrity()
    assert run_requests(engine)[0].prompt_logprobs == naive_reading(request)[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stop_check_sees_the_tokens_of_its_answer_and_no_others(depth: int) -> None:
    """Not those of surplus rows, nor of the steps in flight when its sequence took a lane."""
    engine, _ = checking_engine(400, step_tokens=16, depth=depth)
    seen: dict[int, list[int]] = {number: [] for number in range(40)}
    for number in range(40):
        check = seen[number].append  # None: it never stops the answer
        engine.add(replace(make_request(number, [1 + number, *range(number % 7)], 1 + number % 11), stop_check=check))
    answers = run_requests(engine)
    for number in range(40):
        assert seen[number] == [token for token in answers[number].token_ids if token != EOS]


def test_prefixes_of_answers_in_flight_are_found_again() -> None:
    """A block is indexed once all its tokens are known, the last of them one step later than without tickets."""
    for length in range(1, 14):
        engine, _ = checking_engine(50, depth=1)
        first = make_request(0, [1, 2, 3], length)
        answer = run_requests(engine, [first])[0].token_ids
        run_requests(engine, [make_request(1, [*first.prompt, *answer, 49, 49, 49, 49, 49], 1)])
        assert engine.stats.prompt_tokens_reused == (3 + len(answer) - 1) // 4 * 4


@pytest.mark.parametrize("block_size", [4, 512])
@pytest.mark.parametrize("depth", [1, 2])
def test_lanes_with_steps_in_flight_keep_their_tokens(block_size: int, depth: int) -> None:
    """However they leave, move into gaps and enter between a launch and its result."""
    requests = [make_request(number, [1 + number % 40, 2], 1 + 37 * number % 301) for number in range(40)]
    requests += [make_request(40 + number, [REPEATS, number % 5], 1 + 29 * number % 200) for number in range(20)]
    engine, runner = checking_engine(20_000 // block_size, block_size, depth=depth, drafts=3, draft_rows=6)
    assert_right(engine, requests)
    assert runner.launched_ahead > 0 and engine.stats.accepted_tokens > 0
    assert all(EOS in one.stop_ids for one in requests)
