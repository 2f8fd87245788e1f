"""The engine against a naive loop: batching, chunks, prefix hits, preemption and failures change no token."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.length_estimator import OutputLengthEstimator
from batchinfer.engine.plan import PromptRead, Reading, StepPlan, StepResult
from batchinfer.errors import EngineError, TooLong
from batchinfer.request import Request, SamplingParams
from tests.engine.checking import EOS, checking_engine, make_reading, make_request, naive, naive_reading
from tests.harness import InstantRunner, expect_short_answers, fake_runner, make_engine, make_scheduler, run_requests


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("max_step_tokens", [8, 1000])
@pytest.mark.parametrize("num_blocks", [12, 400])
def test_answers_equal_those_of_a_naive_loop(caching: bool, max_step_tokens: int, num_blocks: int) -> None:
    rng = random.Random(num_blocks + max_step_tokens)
    shared = [rng.randrange(1, 50) for _ in range(20)]
    requests = [
        make_request(i, shared[: rng.randrange(20)] + [rng.randrange(1, 50) for _ in range(rng.randrange(1, 15))], 12)
        for i in range(60)
    ]
    engine, _ = checking_engine(num_blocks, step_tokens=max_step_tokens, caching=caching)
    expect_short_answers(engine.scheduler)
    answers = run_requests(engine, requests)
    for request in requests:
        assert answers[request.request_id].token_ids == naive(request)
    if num_blocks == 12:
        assert engine.stats.preemptions > 0, "the budget was meant to force preemption"
    assert (engine.stats.prompt_tokens_reused > 0) == caching


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("max_step_tokens", [8, 1000])
@pytest.mark.parametrize("num_blocks", [12, 400])
def test_prompts_are_read_once_and_whole(caching: bool, max_step_tokens: int, num_blocks: int) -> None:
    """Each row that is read comes from a step that computed it, whatever was cached, cut in chunks or preempted."""
    rng = random.Random(num_blocks + max_step_tokens)
    shared = [rng.randrange(1, 50) for _ in range(20)]
    requests = []
    for i in range(80):
        prompt = shared[: rng.randrange(20)] + [rng.randrange(1, 50) for _ in range(rng.randrange(1, 15))]
        reads = [{}, {"score_from": 1}, {"score_from": rng.randrange(1, len(prompt) + 1)}]
        reads += [{"pooling": pooling} for pooling in ("mean", "last", "cls")]
        kind = rng.choice(reads)
        requests.append(make_reading(i, prompt, 12 if not kind else rng.choice([0, 0, 1, 12]), **kind))
    engine, _ = checking_engine(num_blocks, step_tokens=max_step_tokens, caching=caching)
    expect_short_answers(engine.scheduler)
    answers = run_requests(engine, requests)
    for request in requests:
        answer = answers[request.request_id]
        assert answer.error is None and answer.token_ids == naive(request)
        assert (answer.prompt_logprobs, answer.hidden) == naive_reading(request)
        assert request.max_tokens or answer.finish_reason == "length"
    if num_blocks == 12:
        assert engine.stats.preemptions > 0, "the budget was meant to force preemption"
    assert (engine.stats.prompt_tokens_reused > 0) == caching


def test_cached_blocks_serve_up_to_the_first_row_that_is_read() -> None:
    engine, _ = checking_engine(100, block_size=4)
    prompt = list(range(1, 22))
    run_requests(engine, [make_request(0, prompt, 1)])
    for score_from in (1, 4, 5, 8, 9, 21):
        before = engine.stats.prompt_tokens_reused
        answer = run_requests(engine, [make_reading(1, prompt, 0, score_from=score_from)])[1]
        assert answer.prompt_logprobs == naive_reading(answer.request)[0]
        assert engine.stats.prompt_tokens_reused - before == min(score_from - 1, 19)  # one is always computed


def test_a_scored_prompt_computes_no_more_than_it_needs() -> None:
    """Not the last token, whose successor nobody asks for; so a prompt may be one token longer than the cache."""
    engine, _ = checking_engine(4, block_size=4)
    request = make_reading(0, list(range(1, 18)), 0, score_from=1)
    answer = run_requests(engine, [request])[0]
    assert answer.prompt_logprobs == naive_reading(request)[0] and len(answer.prompt_logprobs) == 17
    assert engine.stats.prompt_tokens_computed == 16 and engine.stats.generated_tokens == 0
    with pytest.raises(TooLong):
        engine.add(make_reading(1, list(range(18)), 0, score_from=1))
    single = run_requests(engine, [make_reading(2, [5], 0, score_from=1)])[2]
    assert single.prompt_logprobs == [None] and single.finish_reason == "length" and single.token_ids == []


def test_an_unsound_reading_ends_its_sequence_alone() -> None:
    engine, runner = checking_engine(100, step_tokens=16)
    runner.poison = 33
    requests = [
        make_reading(i, [i + 1, 2, 3, 33 if i % 3 == 1 else 4, *range(10, 15)], i % 2, score_from=2) for i in range(9)
    ]
    answers = run_requests(engine, requests)
    for request in requests:
        answer = answers[request.request_id]
        if 33 in request.prompt:
            assert answer.error is not None and "poisoned" in str(answer.error) and answer.error.retryable
        else:
            assert answer.prompt_logprobs == naive_reading(request)[0] and answer.token_ids == naive(request)
    again = make_reading(100, requests[1].prompt, 0, score_from=9)
    reused = engine.stats.prompt_tokens_reused
    run_requests(engine, [again])
    assert engine.stats.prompt_tokens_reused == reused, "blocks of a failed sequence must not be found again"


def test_fake_readings_depend_on_the_request_alone() -> None:
    def answers(order: list[int], seats: int, budget: int) -> dict[int, tuple[object, object]]:
        engine = make_engine(fake_runner(3, 20, range(10, 40), EOS), 60, seats=seats, step_tokens=budget)
        params = SamplingParams(prompt_logprobs=2)
        kinds = [{"score_from": 1}, {"pooling": "mean"}, {"score_from": 3}, {"pooling": "last"}]
        requests = [Request(i, [i % 7, *range(10, 15 + i % 5)], params, 0, **kinds[i % 4]) for i in order]
        return {i: (answer.prompt_logprobs, answer.hidden) for i, answer in run_requests(engine, requests).items()}

    reference = answers(list(range(40)), 8, 100)
    assert answers(list(reversed(range(40))), 3, 4) == reference
    for entry in [entry for scores, _ in reference.values() for entry in scores or () if entry is not None]:
        assert entry.logprob < 0 and entry.logprob == dict(entry.top).get(entry.token_id, entry.logprob)
        assert len(entry.top) == 2 and entry.logprob <= entry.top[0][1]
    assert len({tuple(hidden) for _, hidden in reference.values() if hidden is not None}) > 10


def test_sequences_admitted_in_one_step_compute_a_common_prefix_once() -> None:
    """Two sequences admitted in one step compute a common prefix once, also when it takes several chunks."""
    engine, _ = checking_engine(100, block_size=4, step_tokens=24)
    prompt = list(range(1, 41))
    answers = run_requests(engine, [make_request(i, [*prompt, 41 + i], 5) for i in range(4)])
    assert len(answers) == 4
    assert engine.stats.prompt_tokens_computed == 40 + 4
    assert engine.stats.prompt_tokens_reused == 3 * 40


def test_a_block_with_a_cached_beginning_is_computed_from_the_first_difference() -> None:
    engine, runner = checking_engine(100, block_size=4)
    prompts = [[*range(1, 12), 20 + i, 30, 31, 32] for i in range(3)]
    plans = []
    runner.fail_if = lambda plan: plans.append(plan)  # None: nothing fails
    for i, prompt in enumerate(prompts):
        request = make_request(i, prompt, 5)
        assert run_requests(engine, [request])[i].token_ids == naive(request)
    assert engine.stats.prompt_tokens_computed == 15 + 4 + 4
    assert engine.stats.prompt_tokens_reused == 11 + 11
    assert [len(plan.copies) for plan in plans if plan.joins] == [0, 1, 1]
    # no block begins as it does in a fourth of its tokens; and none is looked for without a cache
    for other in (checking_engine(100, block_size=8), checking_engine(100, block_size=4, caching=False)):
        for i, tail in enumerate(([2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 9, 9, 9])):
            run_requests(other[0], [make_request(i, [1, *tail], 1)])
        assert other[0].stats.prompt_tokens_reused == 0


def test_a_block_of_the_same_step_is_not_copied() -> None:
    """It is not computed before the step is."""
    engine, _ = checking_engine(100, block_size=4)
    requests = [make_request(i, [*range(1, 12), 20 + i], 1) for i in range(3)]
    answers = run_requests(engine, requests)
    assert all(answers[request.request_id].token_ids == naive(request) for request in requests)
    assert engine.stats.prompt_tokens_reused == 2 * 8


def test_admission_waits_for_a_full_step_that_computes_the_shared_prefix() -> None:
    """A fourth of a block at least, beyond what there is: what fills a step need not be computed twice in it."""
    for shared, waits in ((203, True), (201, True), (200, False)):
        engine, runner = checking_engine(1000, block_size=4, step_tokens=2048)
        plans = []
        runner.fail_if = lambda plan, plans=plans: plans.append(plan)
        requests = [make_request(i, [*range(shared), 500 + i, 600, 601, 602, 603, 604], 2) for i in range(4)]
        answers = run_requests(engine, requests)
        assert all(answers[request.request_id].token_ids == naive(request) for request in requests)
        assert [len(plan.joins) for plan in plans if plan.joins] == ([1, 3] if waits else [4])
        assert engine.stats.prompt_tokens_reused == 3 * shared


def test_a_block_is_copied_before_the_same_step_overwrites_it() -> None:
    engine, runner = checking_engine(3, block_size=4)
    run_requests(engine, [make_request(0, list(range(1, 9)), 1)])
    plans = []
    runner.fail_if = lambda plan: plans.append(plan)
    request = make_request(1, [1, 2, 3, 4, 5, 6, 40, 41, 42, 43, 44], 1)
    assert run_requests(engine, [request])[1].token_ids == naive(request)
    copy, written = plans[0].copies[0], plans[0].grown[0].blocks
    assert copy.source in written and copy.target in written
    assert engine.stats.prompt_tokens_reused == 6


def test_a_prompt_found_whole_in_the_cache_computes_one_token() -> None:
    engine, _ = checking_engine(100, block_size=4)
    request = make_request(0, list(range(1, 9)), 3)
    first = run_requests(engine, [request])[0].token_ids
    computed = engine.stats.prompt_tokens_computed
    assert run_requests(engine, [request])[0].token_ids == first
    assert engine.stats.prompt_tokens_computed - computed == 1


def test_a_prompt_beyond_the_cache_is_refused_and_an_answer_beyond_it_is_an_error() -> None:
    engine, _ = checking_engine(num_blocks=4, block_size=4)
    with pytest.raises(TooLong, match="16 tokens and the KV cache 16"):
        engine.add(make_request(0, [1] * 16, 5))
    long, short = make_request(1, [1] * 14, 500), make_request(2, [2], 3)
    long = Request(1, long.prompt, long.params, 500)  # no stop ids: it grows until nothing fits
    answers = run_requests(engine, [long, short])
    assert isinstance(answers[1].error, TooLong) and answers[1].finish_reason == "error"
    assert answers[2].token_ids == naive(short)


def test_a_sequence_that_fails_steps_is_found_and_ends_alone() -> None:
    engine, runner = checking_engine(400, seats=16, step_tokens=200)
    requests = [make_request(i, [1 + i, 2, 3], 10) for i in range(40)]
    runner.fail_if = lambda plan: any(
        runner.prompts[seat][0] == 18 and start + count > 4
        for seat, start, count in zip(plan.seats, plan.starts, plan.counts, strict=True)
    )
    answers = run_requests(engine, requests)
    assert len(naive(requests[17])) > 2, "request 17 must get to the poisoned position"
    for request in requests:
        answer = answers[request.request_id]
        if request.request_id == 17:
            assert answer.error is not None and "injected" in str(answer.error) and answer.error.retryable
        else:
            assert answer.error is None and answer.token_ids == naive(request)


def test_engine_gives_up_when_every_step_fails() -> None:
    engine, runner = checking_engine(400)
    runner.fail_if = lambda plan: True
    with pytest.raises(EngineError, match="injected"):
        run_requests(engine, [make_request(i, [1 + i % 40], 10) for i in range(200)])


def test_failed_rows_of_a_result_end_alone() -> None:
    class Flaky(InstantRunner):
        def launch(self, plan: StepPlan, constraints: object) -> StepResult:
            return StepResult([7] * sum(plan.samples), failed={0: "logits are not finite"})

    engine = make_engine(Flaky(), 100, seats=4, step_tokens=64)
    answers = run_requests(engine, [make_request(i, [1, 2, 3, 4, 5 + i], 1) for i in range(2)])
    assert answers[0].error is not None and "not finite" in str(answers[0].error)
    assert answers[1].token_ids == [7]
    assert engine.stats.prompt_tokens_reused == 4
    run_requests(engine, [make_request(2, [1, 2, 3, 4, 9], 1)])
    assert engine.stats.prompt_tokens_reused == 4, "blocks of a failed sequence must not be found again"


def test_abort_frees_seats_and_blocks() -> None:
    engine, _ = checking_engine(50)
    for i in range(12):
        engine.add(make_request(i, [1, 2, 3, i], 50))
    engine.step()
    for i in range(12):
        assert engine.abort(i)
        engine.scheduler.check_integrity()
    assert not engine.abort(3) and not engine.has_work
    assert engine.scheduler.pool.num_free == 50


def test_stop_check_sees_every_token_once() -> None:
    seen: list[int] = []

    def stop(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    engine = make_engine(fake_runner(9, 9, [5, 6], EOS), 9, seats=2, step_tokens=8)
    answers = run_requests(engine, [Request(0, [1], SamplingParams(temperature=0), 9, stop_check=stop)])
    assert answers[0].finish_reason == "stop" and len(seen) == 3 and answers[0].token_ids == seen


def test_fake_answers_depend_on_the_request_alone() -> None:
    def answers(order: list[int], seats: int, budget: int) -> dict[int, list[int]]:
        engine = make_engine(fake_runner(3, 20, range(10, 40), EOS), 60, seats=seats, step_tokens=budget)
        params = SamplingParams(temperature=0.5)
        requests = [
            Request(i, [i % 7] * (1 + i % 5), params, 30, key=i * 977, stop_ids=frozenset([EOS])) for i in order
        ]
        return {i: answer.token_ids for i, answer in run_requests(engine, requests).items()}

    reference = answers(list(range(40)), 8, 100)
    assert {len(ids) for ids in reference.values()} <= set(range(3, 21)) and len(
        set(map(tuple, reference.values()))
    ) > 30
    assert answers(list(reversed(range(40))), 3, 4) == reference


def test_estimated_length_is_a_running_quantile() -> None:
    estimator = OutputLengthEstimator(quantile=0.8, window=100, enough=10)
    assert estimator.estimate_up_to(1000) == 256 and estimator.estimate_up_to(20) == 20
    for length in range(1, 101):
        estimator.observe(length)
    assert estimator.estimate_up_to(1000) == 80
    for _ in range(100):
        estimator.observe(7)
    assert estimator.estimate_up_to(1000) == 7


def test_admission_by_estimated_length_prevents_preemption() -> None:
    """Once lengths are known, hardly anything is preempted, although max_tokens alone would fit two at a time."""
    engine, _ = checking_engine(num_blocks=64, block_size=4, seats=32)
    engine.scheduler.length_estimator = OutputLengthEstimator(enough=4)
    requests = [make_request(i, [1 + i % 40, 2, 3, i // 40 + 1], 100) for i in range(300)]
    answers = run_requests(engine, requests)
    assert all(answers[r.request_id].token_ids == naive(r) for r in requests)
    assert engine.stats.preemptions < 40


def test_admission_sets_aside_the_exact_length_if_nothing_ends_an_answer_early() -> None:
    """Short answers before say nothing about those: what they will take is set aside, and nothing is preempted."""
    engine, _ = checking_engine(num_blocks=64, block_size=4, seats=32)
    engine.scheduler.length_estimator = OutputLengthEstimator(enough=1)
    engine.scheduler.length_estimator.observe(1)
    requests = [Request(i, [1 + i], SamplingParams(temperature=0), 60) for i in range(20)]
    assert len(run_requests(engine, requests)) == 20
    assert engine.stats.preemptions == 0


def test_plans_of_a_small_case_are_as_written_here() -> None:
    """The plan of a small case, whole: what crosses to other ranks does not change unnoticed."""
    scheduler = make_scheduler(8, seats=2, step_tokens=6)
    first, second = make_request(0, [1, 2, 3, 4, 5, 6, 7], 3), make_request(1, [1, 2, 3, 4, 9], 3)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(join.seat, join.prompt, join.output) for join in plan.joins] == [
        (0, first.prompt, ()),
        (1, second.prompt, ()),
    ]
    assert [tuple(g) for g in plan.grown] == [(0, 0, (0,)), (1, 0, (0, 1))]
    assert (plan.seats, plan.starts, plan.counts, plan.samples) == ([0, 1], [0, 4], [4, 1], [False, True])
    assert plan.tokens == [1, 2, 3, 4, 9]
    scheduler.update(StepResult([11]))
    plan = scheduler.schedule()
    assert plan.joins == () and [tuple(g) for g in plan.grown] == [(0, 1, (2,))]
    assert (plan.seats, plan.starts, plan.counts, plan.samples) == ([1, 0], [5, 4], [1, 3], [True, True])
    assert plan.tokens == [11, 5, 6, 7] and plan.reads == (), "those that only decode come first"


def test_plans_with_prompt_reads_are_as_written_here() -> None:
    scheduler = make_scheduler(8, seats=2, step_tokens=6)
    scheduler.add(make_reading(0, [1, 2, 3, 4, 5, 6, 7], 0, score_from=3))
    scheduler.add(make_reading(1, [1, 2], 1, pooling="mean"))
    plan = scheduler.schedule()
    assert (plan.counts, plan.samples, plan.tokens) == ([6], [False], [1, 2, 3, 4, 5, 6])
    assert [tuple(read) for read in plan.reads] == [(0, 2, 4)]
    scheduler.update(StepResult([], readings=[Reading(["a", "b", "c", "d"])]))
    assert scheduler.take_finished()[0].prompt_logprobs == [None, None, None, "a", "b", "c", "d"]
    plan = scheduler.schedule()
    assert (plan.counts, plan.samples, plan.reads) == ([2], [True], (PromptRead(0, 0, 2),))


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_prefix_is_evicted_after_the_blocks_that_follow_it(data: st.DataObject) -> None:
    """Whatever is released in whatever order, a prefix is never evicted before what follows it."""
    pool = BlockPool(8, 2)
    chain, parent = [], 0
    for start in range(4):
        block = pool.allocate()
        parent = pool.index(block, parent, (start, start))
        chain.append(block)
    pool.release(chain)
    for _ in range(data.draw(st.integers(0, 8))):
        pool.allocate()
    found = [block.key is not None for block in chain]
    assert found == sorted(found, reverse=True)
