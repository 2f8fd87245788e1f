"""Any order of what can happen to an engine: answers are those of the plainest loop, and nothing is lost."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchinfer.engine import scheduler
from batchinfer.request import Finished, Request
from tests.engine.checking import REPEATS, checking_engine, make_reading, make_request, naive, naive_reading


class EngineMachine(RuleBasedStateMachine):
    """Requests come, steps pass, some are aborted, some steps fail; blocks and seats always add up."""

    speculative_tokens = 3

    def __init__(self) -> None:
        super().__init__()
        self.engine, self.runner = checking_engine(14, 3, seats=4, step_tokens=7, drafts=self.speculative_tokens)
        self.requests: dict[int, Request] = {}
        self.answers: dict[int, Finished] = {}
        self.added = 0

    @rule(prompt=st.lists(st.integers(1, 3), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self._add(make_request(self.added, prompt, max_tokens))

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
            self._take(self.engine.step())
            self.engine.scheduler.check_integrity()

    @precondition(lambda self: self.engine.has_work)
    @rule()
    def failing_step(self) -> None:
        self.runner.fail_if = lambda plan: len(plan.seats) > 1
        self._take(self.engine.step())
        self.runner.fail_if = lambda plan: False

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
            self._take(self.engine.step())
        assert not self.engine.has_work
        for request_id, request in self.requests.items():
            answer = self.answers[request_id]
            assert answer.token_ids == naive(request)
            assert (answer.prompt_logprobs, answer.hidden) == naive_reading(request)
        assert self.engine.scheduler.pool.num_free == 14

    def _add(self, request: Request) -> None:
        self.added += 1
        self.requests[request.request_id] = request
        self.engine.add(request)

    def _take(self, finished: list[Finished]) -> None:
        self.answers.update({answer.request.request_id: answer for answer in finished})


class PlainMachine(EngineMachine):
    """Without drafts; sequences that only decode are not visited then."""

    speculative_tokens = 0


class MixedMachine(EngineMachine):
    """Drafts for two sequences, and none where more are running."""

    def __init__(self) -> None:
        self.most = patch.object(scheduler, "MAX_ROWS", 3)
        self.most.start()
        super().__init__()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.most.stop()


for machine in (EngineMachine, PlainMachine, MixedMachine):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestEngineMachine = EngineMachine.TestCase
TestPlainMachine = PlainMachine.TestCase
TestMixedMachine = MixedMachine.TestCase
