"""Any order of what can happen to an engine: answers are those of the plainest loop, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchinfer.errors import OutOfDeviceMemory
from batchinfer.request import Finished, Request
from tests.engine.checking import (
    BREAKS,
    COMPLETES,
    REPEATS,
    checking_engine,
    make_reading,
    make_request,
    naive,
    naive_reading,
)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, steps pass, some are aborted, some steps fail; blocks and seats always add up."""

    depth = 0
    drafts = 3
    draft_rows = 128

    def __init__(self) -> None:
        super().__init__()
        limits = {"seats": 4, "step_tokens": 7, "drafts": self.drafts, "draft_rows": self.draft_rows}
        self.engine, self.runner = checking_engine(14, 3, depth=self.depth, **limits)
        self.requests: dict[int, Request] = {}
        self.answers: dict[int, Finished] = {}
        self.streamed: dict[int, list[int]] = {}  # every second request is streamed
        self.added = 0

    @rule(prompt=st.lists(st.integers(1, 3), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self._add(make_request(self.added, prompt, max_tokens))

    @rule(
        prompt=st.lists(st.integers(1, 3), min_size=1, max_size=9),
        max_tokens=st.integers(1, 12),
        end=st.sampled_from([COMPLETES, BREAKS, "check"]),
    )
    def add_ending(self, prompt: list[int], max_tokens: int, end: int | str) -> None:
        """Add a request whose answer may end by a grammar, with a failed row, or by a stop check."""
        request = make_request(self.added, prompt, max_tokens)
        kind = {"key": end} if isinstance(end, int) else {"stop_check": lambda token: token % 5 == 2}
        self._add(replace(request, **kind))

    @rule(prompt=st.lists(st.integers(1, 3), max_size=9), max_tokens=st.integers(1, 25))
    def add_repeating(self, prompt: list[int], max_tokens: int) -> None:
        self._add(make_request(self.added, [REPEATS, *prompt], max_tokens))

    @rule(
        prompt=st.lists(st.integers(1, 3), min_size=1, max_size=20),
        max_tokens=st.integers(0, 3),
        reads=st.sampled_from(["mean", "last", "cls", 1, 1, 3, 9]),
    )
    def add_reading(self, prompt: list[int], max_tokens: int, reads: int | str) -> None:
        kind = {"pooling": reads} if isinstance(reads, str) else {"score_from": min(reads, len(prompt))}
        self._add(make_reading(self.added, prompt, max_tokens, **kind))

    @precondition(lambda self: self.engine.has_work)
    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()
            self.engine.scheduler.check_integrity()

    @precondition(lambda self: self.engine.has_work)
    @rule()
    def failing_step(self) -> None:
        self.runner.fail_if = lambda plan: len(plan.seats) > 1
        self._step()
        self.runner.fail_if = lambda plan: False

    @precondition(lambda self: self.engine.has_work)
    @rule(out_of_memory=st.booleans())
    def failing_collection(self, out_of_memory: bool) -> None:
        """Fail the oldest step in flight, with steps after it."""
        if out_of_memory and self.engine.scheduler.max_step_tokens > 4:
            self.runner.error = OutOfDeviceMemory("injected")
        self.runner.fail_late = lambda plan: len(plan.seats) > 1
        self._step()
        self.runner.fail_late = lambda plan: False
        self.runner.error = RuntimeError("injected")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if self.engine.abort(request_id):
            del self.requests[request_id]

    @invariant()
    def adds_up(self) -> None:
        self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self._step()
        assert not self.engine.has_work and not self.engine._tickets
        for request_id, request in self.requests.items():
            answer = self.answers[request_id]
            assert answer.token_ids == naive(request) == self.streamed.get(request_id, answer.token_ids)
            assert (answer.error is not None) == (
                len(answer.token_ids) < len(naive(replace(request, key=0))) and request.key == BREAKS
            )
            assert (answer.prompt_logprobs, answer.hidden) == naive_reading(request)
        assert self.engine.scheduler.pool.num_free == 14

    def _add(self, request: Request) -> None:
        self.added += 1
        self.requests[request.request_id] = request
        if request.request_id % 2:
            self.streamed[request.request_id] = []
        self.engine.add(request, subscribe=request.request_id % 2 == 1)

    def _step(self) -> None:
        output = self.engine.step()
        self.answers.update({answer.request.request_id: answer for answer in output.finished})
        for request_id, news in output.new_tokens.items():
            self.streamed[request_id] += news.token_ids


class PlainMachine(EngineMachine):
    """Without drafts."""

    drafts = 0


class MixedMachine(EngineMachine):
    """Drafts in steps of at most three tokens only."""

    draft_rows = 3


class AheadMachine(EngineMachine):
    """A step is in flight while the next one is launched."""

    depth = 1


class PlainAheadMachine(PlainMachine):
    """Ahead, and without drafts."""

    depth = 1


class MixedAheadMachine(MixedMachine):
    """Ahead, and with drafts in small steps."""

    depth = 1


class FarAheadMachine(MixedMachine):
    """Two steps are in flight while the next one is launched."""

    depth = 2


MACHINES = (
    *(EngineMachine, PlainMachine, MixedMachine),
    *(AheadMachine, PlainAheadMachine, MixedAheadMachine, FarAheadMachine),
)
for machine in MACHINES:
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestEngineMachine = EngineMachine.TestCase
TestPlainMachine = PlainMachine.TestCase
TestMixedMachine = MixedMachine.TestCase
TestAheadMachine = AheadMachine.TestCase
TestPlainAheadMachine = PlainAheadMachine.TestCase
TestMixedAheadMachine = MixedAheadMachine.TestCase
TestFarAheadMachine = FarAheadMachine.TestCase
