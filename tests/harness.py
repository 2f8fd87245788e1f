"""Engines for tests: built from parts, made to preempt, and run until they are idle.

The model behind an engine is a runner: `CheckingRunner` (tests/engine/checking.py) checks what the KV cache holds,
`fake_runner` answers by hashing, `decoder_engine` computes a real decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import Engine, StepRunner
from batchinfer.engine.fake import FakeAnswer, FakeRunner
from batchinfer.engine.length_estimator import OutputLengthEstimator
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.engine.scheduler import Scheduler
from batchinfer.request import Constraint, Finished, Request, SamplingParams

GREEDY = SamplingParams(temperature=0)
_MOST_STEPS = 100_000


def make_scheduler(
    num_blocks: int,
    block_size: int = 4,
    *,
    seats: int = 8,
    step_tokens: int = 32,
    caching: bool = True,
    drafts: int = 0,
    draft_rows: int = 128,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size, caching)
    return Scheduler(pool, seats, step_tokens, drafts, max_draft_rows=draft_rows)


def make_engine(runner: StepRunner, num_blocks: int, block_size: int = 4, **limits: Any) -> Engine:
    """limits: those of `make_scheduler`."""
    return Engine(make_scheduler(num_blocks, block_size, **limits), runner)


class InstantRunner:
    """A runner whose step is done when `launch` returns, with its result: what a subclass defines."""

    depth = 0

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> StepResult:
        raise NotImplementedError

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def discard(self) -> None:
        pass


def run_step(runner: StepRunner, plan: StepPlan) -> StepResult:
    """Launch a step without grammars and collect its result."""
    return runner.collect(runner.launch(plan, {}))


def fake_runner(shortest: int, longest: int, vocabulary: Iterable[int], eos_id: int) -> FakeRunner:
    """Return a runner whose answers depend on the request alone."""
    return FakeRunner(FakeAnswer(shortest, longest, list(vocabulary), eos_id))


def decoder_runner(decoder: Any, num_blocks: int, block_size: int, seats: int, context: int = 128) -> Any:
    """Return a ModelRunner whose KV cache is full of NaN: a read of a slot that was not written shows."""
    from batchinfer.runner.model_runner import ModelRunner  # only here: tests of the pure engine need no torch

    runner = ModelRunner(decoder, num_blocks, block_size, seats, context)
    for layer in runner.cache.layers:
        layer.fill_(math.nan)
    return runner


def decoder_engine(
    decoder: Any, num_blocks: int, block_size: int = 4, *, seats: int = 6, step_tokens: int = 24, caching: bool = True
) -> Engine:
    """Return an engine over a `decoder_runner` that preempts."""
    runner = decoder_runner(decoder, num_blocks, block_size, seats)
    engine = make_engine(runner, num_blocks, block_size, seats=seats, step_tokens=step_tokens, caching=caching)
    expect_short_answers(engine.scheduler)
    return engine


def expect_short_answers(scheduler: Scheduler) -> None:
    """Let it admit far more sequences than its blocks hold, so that some are preempted."""
    scheduler.length_estimator = OutputLengthEstimator(quantile=0.0, enough=1)
    scheduler.length_estimator.observe(1)


def never_stop(token_id: int) -> bool:
    """Return False: a stop check for answers that nothing ends early, which the scheduler cannot know."""
    return False


def run_requests(engine: Engine, requests: Iterable[Request] = ()) -> dict[int, Finished]:
    """Add the requests and step until the engine is idle, with its integrity checked; results by request id."""
    for request in requests:
        engine.add(request)
    finished: dict[int, Finished] = {}
    for _ in range(_MOST_STEPS):
        if not engine.has_work:
            return finished
        finished |= {one.request.request_id: one for one in engine.step().finished}
        engine.scheduler.check_integrity()
    raise AssertionError("the engine does not come to an end")
