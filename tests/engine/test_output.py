"""Step output: first tokens, and new tokens of the requests that subscribed, in whatever way a step appends them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from batchinfer.engine.engine import Engine
from batchinfer.request import Finished, Request, SamplingParams, TokenLogprob
from tests.engine.checking import EOS, REPEATS, checking_engine, make_reading, make_request, naive
from tests.harness import expect_short_answers, fake_runner, make_engine


class Listener:
    """Steps an engine and keeps what its output says about each request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        self.started: list[int] = []
        self.finished: dict[int, Finished] = {}

    def step(self) -> None:
        output = self._engine.step()
        self._engine.scheduler.check_integrity()
        self.started += output.started
        for request_id, news in output.new_tokens.items():
            assert news.token_ids and request_id not in self.finished
            self.tokens.setdefault(request_id, []).extend(news.token_ids)
            self.logprobs.setdefault(request_id, []).extend(news.logprobs or [])
        self.finished |= {answer.request.request_id: answer for answer in output.finished}

    def drain(self) -> None:
        while self._engine.has_work:
            self.step()


@pytest.mark.parametrize(("num_blocks", "drafts"), [(400, 0), (400, 3), (16, 0), (16, 3)])
def test_new_tokens_of_subscribers_add_up_to_their_answers(num_blocks: int, drafts: int) -> None:
    """With decode lanes, drafts, preemptions and ends in any step; requests without subscription report nothing."""
    rng = random.Random(num_blocks)
    engine, _ = checking_engine(num_blocks, drafts=drafts)
    expect_short_answers(engine.scheduler)
    requests = [make_request(n, [rng.choice((REPEATS, 1 + n % 40)), 2, n % 7], 1 + n * 7 % 40) for n in range(40)]
    requests += [make_reading(n, [1 + n % 30, 2, 3], n % 2, score_from=1) for n in range(40, 50)]
    rng.shuffle(requests)
    listener = Listener(engine)
    for one in requests:
        engine.add(one, subscribe=one.request_id % 3 == 0)
        listener.step()
    listener.drain()
    assert (engine.stats.preemptions > 0) == (num_blocks == 16)
    assert (engine.stats.accepted_tokens > 0) == (drafts > 0)
    wanted = {one.request_id: naive(one) for one in requests if one.request_id % 3 == 0 and one.max_tokens}
    assert listener.tokens == wanted
    assert sorted(listener.started) == sorted(one.request_id for one in requests if one.max_tokens)


def test_logprobs_come_with_their_tokens() -> None:
    engine = make_engine(fake_runner(3, 9, range(10, 40), EOS), 60)
    plain = Request(0, [1, 2], SamplingParams(), 20, stop_ids=frozenset([EOS]))
    engine.add(plain, subscribe=True)
    engine.add(replace(plain, request_id=1, params=SamplingParams(logprobs=1)), subscribe=True)
    listener = Listener(engine)
    listener.drain()
    assert listener.logprobs[0] == [] and listener.logprobs[1] == listener.finished[1].logprobs
    assert [entry.token_id for entry in listener.logprobs[1]] == listener.tokens[1] == listener.finished[1].token_ids


def test_an_aborted_request_reports_nothing_more() -> None:
    engine, _ = checking_engine(100)
    listener = Listener(engine)
    for number in range(2):
        engine.add(make_request(number, [3 + number, 2], 30), subscribe=True)
    listener.step()
    before = list(listener.tokens[0])
    engine.abort(0)
    listener.drain()
    assert listener.tokens[0] == before and listener.tokens[1] == listener.finished[1].token_ids


def test_a_failed_step_reports_no_tokens_and_none_twice() -> None:
    engine, runner = checking_engine(100)
    listener = Listener(engine)
    requests = [make_request(number, [3 + number, 2], 30) for number in range(4)]
    for one in requests:
        engine.add(one, subscribe=True)
    for number in range(12):
        runner.fail_if = lambda plan, number=number: number % 4 == 3 and len(plan.seats) > 1
        listener.step()
    runner.fail_if = lambda plan: False
    listener.drain()
    assert listener.tokens == {one.request_id: naive(one) for one in requests}
    assert sorted(listener.started) == [0, 1, 2, 3]
