"""The engine thread: the one place that touches the `Engine`. Commands in before a step, events out after it."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeVar

from batchinfer.engine.engine import Engine
from batchinfer.engine.output import StepOutput
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import EngineFailure, RowError
from batchinfer.log import log
from batchinfer.request import Finished, Request, TokenLogprob

T = TypeVar("T")


class Event(NamedTuple):
    """News of one sample: tokens since its last event, and how it ended, if it did.

    first_token_s: when its first token came, on the clock of time.monotonic; None before, and for an error.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finished: Finished | None
    first_token_s: float | None

    def then(self, later: Event) -> Event:
        """Both as one."""
        logprobs = None if self.logprobs is None or later.logprobs is None else self.logprobs + later.logprobs
        return later._replace(token_ids=self.token_ids + later.token_ids, logprobs=logprobs)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """State of the engine after its last step."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    num_blocks: int = 1
    stats: EngineStats = dataclasses.field(default_factory=EngineStats)


class _LiveSample:
    """A sample in the engine: whether its client streams, and when its first token came."""

    __slots__ = ("first_token_s", "stream")

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.first_token_s: float | None = None


class EngineLoop:
    """Runs an engine in a thread.

    deliver: gets the events of each step that has any, in the engine thread. fail: gets the reason once, if the engine
    gives up; `failure` holds it from then on, and no command is served any more.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], None], fail: Callable[[str], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._fail = fail
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[int, _LiveSample] = {}
        self._events: list[Event] = []
        self._thread = threading.Thread(target=self._work, name="batchinfer-engine", daemon=True)
        self.failure: str | None = None
        self.snapshot = EngineSnapshot()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now; what is in the engine is dropped."""
        self._inbox.put(None)
        self._thread.join()

    # -- commands, from any thread ------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], stream: bool) -> None:
        """Queue requests. With `stream` every step reports their new tokens, else only the last one does."""
        self._inbox.put(partial(self._add, requests, stream))

    def abort(self, request_ids: Sequence[int]) -> None:
        """Drop requests before the next step; those that have ended are no mistake."""
        self._inbox.put(partial(self._drop, request_ids))

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run `function` between two steps."""
        future: Future[T] = Future()
        self._inbox.put(partial(self._answer, function, future))
        if self.failure is not None:
            self._refuse_calls()
        return future

    # -- the engine thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._report(self._engine.step())
                self._note()
                if self._events:
                    events, self._events = self._events, []
                    self._deliver(events)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.error("the engine stopped", reason=self.failure)
            self._refuse_calls()
            self._fail(self.failure)

    def _obey(self) -> bool:
        """Run what is in the inbox; wait for something if there is nothing else to do. False: stop."""
        wait = not self._engine.has_work and not self._events
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, requests: Sequence[Request], stream: bool) -> None:
        for request in requests:
            try:
                self._engine.add(request, subscribe=stream)
            except Exception as error:  # whatever is wrong with one request must not stop the others
                known = error if isinstance(error, RowError) else EngineFailure(f"{type(error).__name__}: {error}")
                refused = Finished(request, [], "error", error=known)
                self._events.append(Event(request.request_id, [], None, refused, None))
            else:
                self._live[request.request_id] = _LiveSample(stream)

    def _drop(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            if self._live.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _answer(self, function: Callable[[Engine], T], future: Future[T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.failure is not None:
                raise EngineFailure(self.failure)
            future.set_result(function(self._engine))
        except Exception as error:
            future.set_exception(error)

    def _refuse_calls(self) -> None:
        """After a failure: nobody may wait for an answer that never comes."""
        while True:
            try:
                command = self._inbox.get(block=False)
            except queue.Empty:
                return
            if isinstance(command, partial) and command.func == self._answer:
                command()

    def _report(self, output: StepOutput) -> None:
        """Turn the news of a step into events."""
        now = time.monotonic()
        for request_id in output.started:
            self._live[request_id].first_token_s = now
        ended = {answer.request.request_id for answer in output.finished}
        for request_id, (tokens, logprobs) in output.new_tokens.items():
            if request_id not in ended:
                self._events.append(Event(request_id, tokens, logprobs, None, self._live[request_id].first_token_s))
        for answer in output.finished:
            request_id = answer.request.request_id
            live = self._live.pop(request_id)
            tokens, logprobs = answer.token_ids, answer.logprobs
            if live.stream:
                tokens, logprobs = output.new_tokens.get(request_id, ([], None if logprobs is None else []))
            first = None if answer.error is not None else live.first_token_s or now
            self._events.append(Event(request_id, tokens, logprobs, answer, first))

    def _note(self) -> None:
        scheduler = self._engine.scheduler
        num_blocks = len(scheduler.pool.blocks)
        self.snapshot = EngineSnapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=num_blocks - scheduler.pool.num_free,
            num_blocks=num_blocks,
            stats=dataclasses.replace(scheduler.stats),
        )
