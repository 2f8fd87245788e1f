"""A share of the engine for batches: what runs beside HTTP requests, in a thread of its own, and lets them go first.

`SharedEngine` looks like an engine to `Stream`, so that a batch has all that a job has: order by prefixes, repeats that
run once, detokenizing together. It holds at most a share of the seats, so a request that comes never waits for a batch.
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

_SHARE = 0.75  # of the seats
_LOOK_AGAIN_S = 0.05  # for new prompts, while nothing ends


class SharedEngine:
    """Used from one thread; `add_event` and `fail` come from the asyncio thread."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._seats = max(1, int(frontend.model.parts.max_num_seqs * _SHARE))
        self._open: set[int] = set()
        self._ended: queue.SimpleQueue[Finished | ApiError] = queue.SimpleQueue()
        self._stats = EngineStats()

    # -- an engine, as a stream sees it -------------------------------------------------------------------------

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
        self._frontend.lend(request, self)

    def abort(self, request_id: int) -> bool:
        if request_id not in self._open:
            return False
        self._open.discard(request_id)
        self._frontend.take_back(request_id)
        return True

    def step(self) -> StepOutput:
        """Wait a moment for requests to end. Raises EngineError when the engine has stopped."""
        finished: list[Finished] = []
        try:
            ended = self._ended.get(timeout=_LOOK_AGAIN_S if self._open else 0)
            while True:
                if isinstance(ended, ApiError):
                    raise EngineError(str(ended))
                if ended.request.request_id in self._open:  # else it was dropped meanwhile
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

    # -- news, from the asyncio thread --------------------------------------------------------------------------

    def add_event(self, event: Event) -> None:
        if event.finished is not None:
            self._ended.put(event.finished)

    def fail(self, error: ApiError) -> None:
        self._ended.put(error)


class SharedAnswerer:
    """An `Answerer` for jobs over the endpoint's engine."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._engine = SharedEngine(frontend)

    @property
    def model_facts(self) -> ModelFacts:
        return self._frontend.model.facts

    def run(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        """See `Answerer.run`."""
        parts = self._frontend.model.parts
        stream = Stream(prompts, parts.preparer, self._engine, parts.tokenizer, parts.max_num_seqs)
        try:
            yield from stream.completions()
        finally:
            stream.close()

    def stats(self) -> EngineStats:
        return self._engine.stats
