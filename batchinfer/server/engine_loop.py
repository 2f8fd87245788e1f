"""The engine thread, sole owner of the `Engine`: commands go in before a step, events come out after it."""

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
    """New output of one sample: tokens since its last event, and `finished` if it ended.

    first_token_s: time of its first token on the clock of time.monotonic; None before it, and for an error.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finished: Finished | None
    first_token_s: float | None

    def merge_later(self, later: Event) -> Event:
        """Return this event and a later one of the same sample as one event."""
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
    """Loop that runs an engine in a thread.

    deliver: called in the engine thread with the events of a step, if there are any. fail: called once with the reason
    if the engine fails; from then on `failure` holds the reason and no command is served.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], None], fail: Callable[[str], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._fail = fail
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[int, _LiveSample] = {}
        self._events: list[Event] = []
        self._thread = threading.Thread(target=self._run_loop, name="batchinfer-engine", daemon=True)
        self.failure: str | None = None
        self.snapshot = EngineSnapshot()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step, dropping all requests in the engine."""
        self._inbox.put(None)
        self._thread.join()

    # -- commands, from any thread ------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], stream: bool) -> None:
        """Queue requests. stream: report new tokens at every step, else only when a sample ends."""
        self._inbox.put(partial(self._add_requests, requests, stream))

    def abort(self, request_ids: Sequence[int]) -> None:
        """Abort requests before the next step; ended ones are ignored."""
        self._inbox.put(partial(self._abort_requests, request_ids))

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Call `function` with the engine between two steps."""
        future: Future[T] = Future()
        self._inbox.put(partial(self._run_call, function, future))
        if self.failure is not None:
            self._refuse_calls()
        return future

    # -- the engine thread --------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        try:
            while self._run_commands():
                if self._engine.has_work:
                    self._add_events(self._engine.step())
                self._update_snapshot()
                if self._events:
                    events, self._events = self._events, []
                    self._deliver(events)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.error("the engine stopped", reason=self.failure)
            self._refuse_calls()
            self._fail(self.failure)

    def _run_commands(self) -> bool:
        """Run all commands of the inbox, waiting for one if the engine is idle. Return False to stop."""
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

    def _add_requests(self, requests: Sequence[Request], stream: bool) -> None:
        for request in requests:
            try:
                self._engine.add(request, subscribe=stream)
            except Exception as error:  # an error of one request must not stop the others
                known = error if isinstance(error, RowError) else EngineFailure(f"{type(error).__name__}: {error}")
                refused = Finished(request, [], "error", error=known)
                self._events.append(Event(request.request_id, [], None, refused, None))
            else:
                self._live[request.request_id] = _LiveSample(stream)

    def _abort_requests(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            if self._live.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _run_call(self, function: Callable[[Engine], T], future: Future[T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.failure is not None:
                raise EngineFailure(self.failure)
            future.set_result(function(self._engine))
        except Exception as error:
            future.set_exception(error)

    def _refuse_calls(self) -> None:
        """Fail the queued calls after the engine failed, so that no caller waits forever."""
        while True:
            try:
                command = self._inbox.get(block=False)
            except queue.Empty:
                return
            if isinstance(command, partial) and command.func == self._run_call:
                command()

    def _add_events(self, output: StepOutput) -> None:
        """Append the events of one step."""
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

    def _update_snapshot(self) -> None:
        scheduler = self._engine.scheduler
        num_blocks = len(scheduler.pool.blocks)
        self.snapshot = EngineSnapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=num_blocks - scheduler.pool.num_free,
            num_blocks=num_blocks,
            stats=dataclasses.replace(scheduler.stats),
        )
