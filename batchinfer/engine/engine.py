"""The inner loop: schedule, launch, collect, update. Token ids in, token ids out.

State: the scheduler's, tickets of the steps in flight, the subscriptions, and how many steps failed in a row. Owner:
the one thread that calls `step`. Flow: `add` queues a request; `step` asks the scheduler for a plan, launches it on the
runner, gives the result of the oldest step to the scheduler and returns the news. Failure: a step that raises counts
for nothing, nor do those after it, and the scheduler bisects for the sequence at fault; EngineError after too many
failed steps in a row, if the smallest step does not fit the device's memory, or if the device is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from batchinfer.engine.output import StepOutput, Subscriptions
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import EngineError, OutOfDeviceMemory
from batchinfer.log import log
from batchinfer.request import Constraint, Request

_MAX_FAILED_STEPS = 64
_SMALLER = "lower engine.max_step_tokens or engine.max_num_seqs"

Ticket = Any  # for the result of a launched step: only its runner looks into it


class StepRunner(Protocol):
    """Computes steps, in the order of their launches. An exception means that nothing of the step counts.

    depth: steps that may be in flight while another one is launched. 0: a step's result is collected before the next
    step is planned.
    """

    depth: int

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> Ticket:
        """Start a step. `constraints`: compiled grammars of the sequences that join with it, by seat.

        Raises OutOfDeviceMemory, or whatever goes wrong; the runner stays usable, and its steps in flight do too.
        """
        ...

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for the oldest step in flight. Raises what `launch` raises; the steps after it are then discarded."""
        ...

    def discard(self) -> None:
        """Forget all steps in flight: nothing of them counts, and their sequences join again or are gone.

        Raises EngineError if no later step can succeed.
        """
        ...


class Engine:
    """Continuous batching: requests are added at any time, and every `step` returns the requests that ended in it."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._tickets: deque[Ticket] = deque()  # of the steps in flight, oldest first
        self._started: list[int] = []  # ids of requests, for the next `StepOutput`
        self._subscriptions = Subscriptions()
        self._failed_steps = 0  # in a row

    def add(self, request: Request, subscribe: bool = False) -> None:
        """Queue a request; with `subscribe`, steps report its new tokens. Raises TooLong if it can never fit."""
        sequence = self.scheduler.add(request)
        if subscribe:
            self._subscriptions.subscribe(sequence)

    def abort(self, request_id: int) -> bool:
        """Drop a request and free its blocks. Return False if it is not here (any more)."""
        self._subscriptions.unsubscribe(request_id)
        return self.scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """Launch a step and wait for the oldest one; only for one of both while steps in flight become more or fewer.

        Raises EngineError if step after step fails, whatever is in it, or if the device is lost.
        """
        plan = self.scheduler.schedule_ahead() if self._tickets else self.scheduler.schedule()
        launched = plan is not None and len(plan.seats) > 0 and self._launch(plan)
        if self._tickets and (not launched or len(self._tickets) > self._runner.depth):
            self._collect()
        new_tokens = self._subscriptions.collect_new_tokens(self.scheduler.settle)
        finished = self.scheduler.take_finished()
        for answer in finished:
            self._subscriptions.unsubscribe(answer.request.request_id)
        started, self._started = self._started, []
        return StepOutput(finished, started, new_tokens)

    def expected_tokens(self, request: Request) -> int:
        """Return the number of tokens that the answer will probably have."""
        return self.scheduler.length_estimator.estimate(request)

    @property
    def wants_more(self) -> bool:
        """True if the next step may seat more requests than are waiting already."""
        return self.scheduler.wants_more

    @property
    def has_work(self) -> bool:
        """True until all requests have ended and nothing is in flight."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._tickets)

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats

    def _constraints(self, plan: StepPlan) -> dict[int, Constraint]:
        """Return the compiled grammars of the sequences that join with `plan`, by seat: a plan is plain data."""
        found = {}
        for join in plan.joins:
            sequence = self.scheduler.running.get(join.seat)  # None: it left in the step that admitted it
            if sequence is not None and sequence.request.constraint is not None:
                found[join.seat] = sequence.request.constraint
        return found

    def _launch(self, plan: StepPlan) -> bool:
        """Launch a step. Return False if that failed; the steps before it then count, as far as they succeed."""
        try:
            self._tickets.append(self._runner.launch(plan, self._constraints(plan)))
        except Exception as error:
            if all(self._collect() for _ in range(len(self._tickets))):
                self._recover(error)
            return False
        return True

    def _collect(self) -> bool:
        """Apply the result of the oldest step. Return False if the step failed, and all steps in flight with it."""
        try:
            result = self._runner.collect(self._tickets.popleft())
        except Exception as error:
            self._recover(error)
            return False
        self._started += self.scheduler.update(result)
        self._failed_steps = 0
        return True

    def _recover(self, error: Exception) -> None:
        """Forget all steps in flight, the oldest of which raised `error`, and prepare the next try."""
        self._tickets.clear()
        self._runner.discard()
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OutOfDeviceMemory):
            if not self.scheduler.shrink():
                raise EngineError(f"the smallest step does not fit the device's memory: {_SMALLER}: {error}") from error
            tokens = self.scheduler.max_step_tokens
            log.warning(f"out of device memory; steps are smaller from now on: {_SMALLER}", max_step_tokens=tokens)
            return
        self._failed_steps += 1
        log.warning("a step failed; looking for the sequence at fault", reason=reason)
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise EngineError(f"{self._failed_steps} steps failed in a row, the last with {reason}") from error
        self.scheduler.fail(reason)
