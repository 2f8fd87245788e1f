"""The asyncio side of the engine: admission control, preparing prompts, and delivering events to generations."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

from batchinfer.errors import RowError
from batchinfer.llm import EngineParts
from batchinfer.openai.logprobs import TokenTexts
from batchinfer.openai.parse import ModelFacts, ParsedRequest
from batchinfer.pipeline.encoding import Content, PromptEncoder, PromptOptions, SpecialTokens, Text
from batchinfer.pipeline.prompt import Prepared, Prompt, Refused, mix
from batchinfer.request import Request
from batchinfer.server.engine_loop import EngineLoop, Event
from batchinfer.server.errors import ApiError, from_row_error
from batchinfer.server.metrics import Metrics

T = TypeVar("T")

_MAX_RETRY_AFTER_S = 60


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it. names: accepted in requests; the first is the default in replies."""

    parts: EngineParts
    names: tuple[str, ...]
    chat_template: str | None = None
    chat_kwargs: dict[str, Any] = field(default_factory=dict)
    special_tokens: SpecialTokens | None = None

    @property
    def facts(self) -> ModelFacts:
        parts = self.parts
        template = self.chat_template if parts.chat is not None else None
        return ModelFacts(self.names, parts.tokenizer, template, parts.defaults)

    @cached_property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self.parts.tokenizer, self.parts.chat, self.chat_kwargs, self.special_tokens)


class Generation:
    """Samples of one HTTP request in the engine. `Frontend.close_generation` must end it, or its sequences run on."""

    def __init__(self, prepared: list[Prepared]) -> None:
        self.prepared = prepared
        self.open = {request.request_id for prompt in prepared for request in prompt.requests}
        self._events: dict[int, Event] = {}
        self._wakeup = asyncio.Event()
        self._error: ApiError | None = None

    async def event_batches(self) -> AsyncIterator[list[Event]]:
        """Yield new events, at most one per sample: events that pile up while the consumer is busy are merged.

        Raises ApiError if a sample fails or the server ends.
        """
        while True:
            if self._events:
                events, self._events = self._events, {}
                yield list(events.values())
            elif self._error is not None:
                raise self._error
            elif not self.open:
                return
            else:
                await self._wakeup.wait()
                self._wakeup.clear()

    def add_event(self, event: Event) -> None:
        if event.finished is not None:
            self.open.discard(event.request_id)
            if event.finished.error is not None:
                self.fail(from_row_error(event.finished.error))
                return
        earlier = self._events.get(event.request_id)
        self._events[event.request_id] = event if earlier is None else earlier.merge_later(event)
        self._wakeup.set()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._wakeup.set()


class EventSink(Protocol):
    """Receiver of requests' events, in the asyncio thread."""

    def add_event(self, event: Event) -> None: ...

    def fail(self, error: ApiError) -> None: ...


class Frontend:
    """Link between HTTP and the engine thread, used from the asyncio thread.

    `submit_shared` and `abort_shared` alone may be called from any thread. max_waiting: sequences that may wait beyond
    the engine's seats; more are refused with 429 (back-pressure).
    """

    def __init__(self, model: ServedModel, metrics: Metrics, max_waiting: int) -> None:
        self.model = model
        self.metrics = metrics
        self.texts = TokenTexts(model.parts.tokenizer)
        self.engine = EngineLoop(model.parts.engine, self._deliver, self._failed)
        self._seats = model.parts.max_num_seqs
        self._max_waiting = max_waiting
        self._generations: dict[int, EventSink] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="batchinfer-prepare")
        # a pool of its own: requests without a grammar do not wait for a slow compilation
        self._grammars = ThreadPoolExecutor(2, thread_name_prefix="batchinfer-grammar")
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.watch_engine(lambda: self.engine.snapshot)

    def start(self) -> None:
        """Start the engine thread; call it in the serving asyncio loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def stop(self) -> None:
        self.engine.stop()
        for pool in (self._pool, self._grammars):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def failure(self) -> str | None:
        """Return why the engine stopped, None while it works."""
        return self.engine.failure

    @property
    def open_samples(self) -> int:
        return len(self._generations)

    # -- requests to the engine -------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Raise ApiError if the engine stopped (500) or the queue is full (429)."""
        if self.failure is not None:
            raise ApiError(500, f"the engine stopped: {self.failure}", code="engine_failure")
        waiting = len(self._generations) - self._seats
        if waiting >= self._max_waiting:
            wait_s = round(self.metrics.mean_request_s * waiting / self._seats)
            raise ApiError(
                429,
                f"{waiting} sequences are waiting already: try again later",
                code="queue_full",
                retry_after_s=min(max(wait_s, 1), _MAX_RETRY_AFTER_S),
            )

    async def run_in_pool(self, work: Callable[[], T]) -> T:
        """Run slow work in a thread, outside the asyncio loop. Raises ApiError for a RowError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RowError as error:
            raise from_row_error(error) from None

    async def encode_request(self, request: ParsedRequest) -> list[list[int]]:
        """Return the token ids of each prompt; messages go through the chat template. Raises ApiError."""
        return await self.run_in_pool(lambda: self.encode_prompts(request.contents, request.options))

    async def prepare_request(self, request: ParsedRequest) -> list[Prepared]:
        """Encode the prompts, and check token ids and parameters against the model. Raises ApiError."""
        prompts = await self.encode_request(request)
        if request.params.structured_outputs is not None and request.pooling is None:
            compile_ = self.model.parts.preparer.compile_grammar
            await asyncio.get_running_loop().run_in_executor(self._grammars, lambda: compile_(request.params))
        return await self.run_in_pool(lambda: self._prepare(prompts, request))

    def _prepare(self, prompts: Sequence[list[int]], request: ParsedRequest) -> list[Prepared]:
        key = random.getrandbits(64)
        encoded = [
            Prompt(index, [ids], request.params, mix(key, index), read=request.pooling, options=request.options)
            for index, ids in enumerate(prompts)
        ]
        return [_prepared_or_raise(result) for result in self.model.parts.preparer.prepare(encoded)]

    def encode_prompts(self, contents: Sequence[Content], options: PromptOptions) -> list[list[int]]:
        """Return token ids of prompts that are all texts or messages, or all token ids. Raises RowError.

        Blocks: call it in the pool.
        """
        encoder = self.model.encoder
        prompts = [_value_or_raise(encoder.text(content, options)) for content in contents]
        texts = [prompt.text for prompt in prompts if isinstance(prompt, Text)]
        if texts:
            return [_value_or_raise(ids) for ids in encoder.encode(texts, options.special)]
        return [ids for ids in prompts if isinstance(ids, list)]

    def open_generation(self, prepared: list[Prepared], stream: bool) -> Generation:
        """Submit requests to the engine. Raises ApiError if the queue is full. stream: report tokens at every step."""
        self.admit()
        generation = Generation(prepared)
        for request_id in generation.open:
            self._generations[request_id] = generation
        requests: list[Request] = [request for prompt in prepared for request in prompt.requests]
        self.engine.submit(requests, stream)
        return generation

    def close_generation(self, generation: Generation) -> None:
        """Remove a generation; its running sequences are aborted before the next step."""
        left = list(generation.open)
        for request_id in left:
            self._generations.pop(request_id, None)
        generation.open.clear()
        if left:
            self.engine.abort(left)

    def fail_all(self, error: ApiError) -> None:
        """Fail all open generations with `error`."""
        for generation in {id(one): one for one in self._generations.values()}.values():
            generation.fail(error)

    # -- requests of other threads --------------------------------------------------------------------------------

    def submit_shared(self, request: Request, sink: EventSink) -> None:
        """Run a request for another thread; `sink` gets its events in the asyncio thread."""

        def submit() -> None:
            if self.failure is not None:
                sink.fail(ApiError(500, f"the engine stopped: {self.failure}", code="engine_failure"))
                return
            self._generations[request.request_id] = sink
            self.engine.submit([request], False)

        self._call_soon(submit)

    def abort_shared(self, request_id: int) -> None:
        """Abort a request of `submit_shared`."""

        def abort() -> None:
            if self._generations.pop(request_id, None) is not None:
                self.engine.abort([request_id])

        self._call_soon(abort)

    # -- events of the engine -----------------------------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        self._call_soon(lambda: self._dispatch(events))

    def _failed(self, reason: str) -> None:
        self._call_soon(lambda: self.fail_all(ApiError(500, f"the engine stopped: {reason}", code="engine_failure")))

    def _call_soon(self, work: Callable[[], None]) -> None:
        """Call `work` in the asyncio loop, from any thread; do nothing if the loop is closed."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            generation = self._generations.get(event.request_id)
            if generation is None:  # the client is gone
                continue
            if event.finished is not None:
                del self._generations[event.request_id]
            generation.add_event(event)


def _value_or_raise(value: T | RowError) -> T:
    if isinstance(value, RowError):
        raise value
    return value


def _prepared_or_raise(result: Prepared | Refused) -> Prepared:
    if isinstance(result, Refused):
        raise result.error
    return result
