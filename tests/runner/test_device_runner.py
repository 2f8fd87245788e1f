"""The device runner on the pretend device: its answers are those of the plain runner, and nothing of padding shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from batchinfer.engine.engine import Engine
from batchinfer.ops.pretend import ReplayedGraphs
from batchinfer.request import Finished, Request
from tests.harness import decoder_engine, run_requests
from tests.models.tiny import SIZES, build
from tests.runner.devices import both_decoders, device_engine
from tests.runner.test_grammar_mask import SetConstraint
from tests.runner.test_plan_replay import EndsAfter, alternating, workload

VOCAB = SIZES["vocab_size"]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder, num_hidden_layers=2)
    return both_decoders(folder)


def all_kinds(count: int) -> list[Request]:
    """Return requests of every kind that there is, some with a grammar. Each has a stop check of its own."""
    requests = []
    for one in workload(count):
        if one.stop_check is not None:
            one = replace(one, stop_check=EndsAfter(1 + one.request_id % 9).check)
        if one.request_id % 3 == 1 and one.params.allowed_token_ids is None and one.pooling is None:
            one = replace(one, constraint=SetConstraint(alternating), max_tokens=20, stop_check=None, bad_words=())
        requests.append(one)
    return requests


def assert_same(found: dict[int, Finished], expected: dict[int, Finished]) -> None:
    assert found.keys() == expected.keys()
    for number, one in expected.items():
        other = found[number]
        assert other.token_ids == one.token_ids and other.finish_reason == one.finish_reason, number
        assert repr(other.error) == repr(one.error)
        for name in ("logprobs", "prompt_logprobs"):
            entries, others = getattr(one, name), getattr(other, name)
            assert (entries is None) == (others is None)
            for entry, same in zip(entries or [], others or [], strict=True):
                assert (entry is None) == (same is None)
                if entry is not None:
                    assert same.token_id == entry.token_id and same.logprob == pytest.approx(entry.logprob, abs=1e-4)
                    assert [token for token, _ in same.top] == [token for token, _ in entry.top]
                    values = [value for _, value in entry.top]
                    assert [value for _, value in same.top] == pytest.approx(values, abs=1e-4)
        assert (one.hidden is None) == (other.hidden is None)
        if one.hidden is not None:
            np.testing.assert_allclose(other.hidden, one.hidden, atol=1e-4)


@pytest.fixture(scope="module")
def expected(decoders):
    return run_requests(decoder_engine(decoders[0], 400), all_kinds(50))


@pytest.mark.parametrize(
    ("graphs", "num_blocks", "budget", "drafts", "caching"),
    [
        (True, 400, 100, 0, True),
        (True, 400, 9, 0, False),
        (True, 30, 24, 3, True),
        (False, 400, 24, 3, False),
    ],
)
def test_answers_are_those_of_the_plain_runner(decoders, expected, graphs, num_blocks, budget, drafts, caching):
    engine = device_engine(decoders[1], num_blocks, step_tokens=budget, caching=caching, graphs=graphs, drafts=drafts)
    assert_same(run_requests(engine, all_kinds(50)), expected)
    assert (engine.stats.preemptions > 0) == (num_blocks == 30)
    assert (engine.stats.prompt_tokens_reused > 0) == caching
    assert (engine.stats.accepted_tokens > 0) == (drafts > 0)
    replayed = engine._runner._graphs
    assert (isinstance(replayed, ReplayedGraphs) and replayed.replays >= engine.stats.steps - 1) == graphs


def serve_at_random(engine: Engine, requests: Sequence[Request], seed: int) -> tuple[dict[int, Finished], set[int]]:
    """Add requests and drop some of them between steps, at random. Return the answers, and what was dropped."""
    rng = random.Random(seed)
    waiting, added, finished, dropped = list(requests), [], {}, set()
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 3]))):
            added.append(waiting[0].request_id)
            engine.add(waiting.pop(0))
        if added and rng.random() < 0.1:
            number = rng.choice(added)
            if engine.abort(number):
                dropped.add(number)
        finished |= {one.request.request_id: one for one in engine.step().finished}
        engine.scheduler.check_integrity()
    return finished, dropped


@pytest.mark.parametrize(("num_blocks", "graphs"), [(400, True), (30, False)])
def test_random_admission_and_aborts_disturb_nobody(decoders, expected, num_blocks, graphs):
    engine = device_engine(decoders[1], num_blocks, graphs=graphs)
    ahead = []
    launch = engine._runner.launch

    def noting(plan, constraints):
        ahead.append(-1 in plan.tokens)
        return launch(plan, constraints)

    engine._runner.launch = noting
    finished, dropped = serve_at_random(engine, all_kinds(50), num_blocks)
    assert len(dropped) > 3 and finished.keys() | dropped == expected.keys()
    assert_same(finished, {number: expected[number] for number in finished})
    assert sum(ahead) > len(ahead) / 2
    assert (engine.stats.preemptions > 0) == (num_blocks == 30)
