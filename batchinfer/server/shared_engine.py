"""A share of the endpoint's engine for batches, which run in a thread of their own beside HTTP requests.

`SharedEngine` has the interface of an engine that `Stream` needs, so a batch gets what a job gets: prefix ordering,
dedup of identical requests, batched detokenizing. It holds at most a share of the seats, so an HTTP request never waits
for a batch.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterable

from batchinfer.engine.output import StepOutput
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import EngineError
from batchinfer.openai.parse import ModelFacts
from batchinfer.pipeline.prompt import Prompt
from batchinfer.pipeline.stream import Stream
from batchinfer.request import Completion, Finished, Request
from batchinfer.server.engine_loop import Event
from batchinfer.server.errors import ApiError
from batchinfer.server.frontend import Frontend

_SEAT_SHARE = 0.75
_POLL_S = 0.05  # pause between looks for new prompts while no request ends


class SharedEngine:
    """Engine for one thread; the asyncio thread calls `add_event` and `fail`."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._seats = max(1, int(frontend.model.parts.max_num_seqs * _SEAT_SHARE))
        self._open: set[int] = set()
        self._ended: queue.SimpleQueue[Finished | ApiError] = queue.SimpleQueue()
        self._stats = EngineStats()

    # -- the engine's interface to Stream -------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    @property
    def wants_more(self) -> bool:
        return len(self._open) < self._seats

    def expected_tokens(self, request: Request) -> int:
        return request.max_tokens

    def add(self, request: Request) -> None:
        self._open.add(request.request_id)
        self._frontend.submit_shared(request, self)

    def abort(self, request_id: int) -> bool:
        if request_id not in self._open:
            return False
        self._open.discard(request_id)
        self._frontend.abort_shared(request_id)
        return True

    def step(self) -> StepOutput:
        """Return requests that ended, after at most a short wait. Raises EngineError if the engine stopped."""
        finished: list[Finished] = []
        try:
            ended = self._ended.get(timeout=_POLL_S if self._open else 0)
            while True:
                if isinstance(ended, ApiError):
                    raise EngineError(str(ended))
                if ended.request.request_id in self._open:  # else it was aborted
                    self._open.discard(ended.request.request_id)
                    self._count(ended)
                    finished.append(ended)
                ended = self._ended.get(block=False)
        except queue.Empty:
            return StepOutput(finished, [], {})

    def _count(self, ended: Finished) -> None:
        self._stats.generated_tokens += len(ended.token_ids)
        self._stats.prompt_tokens_reused += ended.cached_tokens
        self._stats.prompt_tokens_computed += len(ended.request.prompt) - ended.cached_tokens

    # -- events, from the asyncio thread --------------------------------------------------------------------------

    def add_event(self, event: Event) -> None:
        if event.finished is not None:
            self._ended.put(event.finished)

    def fail(self, error: ApiError) -> None:
        self._ended.put(error)


class SharedAnswerer:
    """`Answerer` for batches that runs prompts on the endpoint's engine."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._engine = SharedEngine(frontend)

    @property
    def model_facts(self) -> ModelFacts:
        return self._frontend.model.facts

    def run_prompts(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        """See `Answerer.run_prompts`."""
        parts = self._frontend.model.parts
        stream = Stream(prompts, parts.preparer, self._engine, parts.tokenizer, parts.max_num_seqs)
        try:
            yield from stream.completions()
        finally:
            stream.close()

    def stats(self) -> EngineStats:
        return self._engine.stats
