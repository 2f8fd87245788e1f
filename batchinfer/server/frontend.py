"""The asyncio side of the engine: admission, preparing prompts, and events for whoever waits for them."""

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
from batchinfer.server.errors import ApiError, of_row
from batchinfer.server.metrics import Metrics

T = TypeVar("T")

_RETRY_LONGEST_S = 60


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it: the names that it answers to, the first of which it signs with."""

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
    """The samples of one HTTP request in the engine. Iterate over its events; close it, or its sequences run on."""

    def __init__(self, prepared: list[Prepared]) -> None:
        self.prepared = prepared
        self.open = {request.request_id for one in prepared for request in one.requests}
        self._events: dict[int, Event] = {}
        self._news = asyncio.Event()
        self._error: ApiError | None = None

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Events as they come, at most one a sample: what comes while nobody looks is put together.

        Raises ApiError when a sample fails or the server ends.
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
                await self._news.wait()
                self._news.clear()

    def add_event(self, event: Event) -> None:
        if event.finished is not None:
            self.open.discard(event.request_id)
            if event.finished.error is not None:
                self.fail(of_row(event.finished.error))
                return
        earlier = self._events.get(event.request_id)
        self._events[event.request_id] = event if earlier is None else earlier.then(event)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._news.set()


class EventSink(Protocol):
    """Gets the news of requests, in the asyncio thread."""

    def add_event(self, event: Event) -> None: ...

    def fail(self, error: ApiError) -> None: ...


class Frontend:
    """Stands between HTTP and the engine thread. All methods but `lend` and `take_back` are for the asyncio thread.

    max_waiting: sequences beyond the engine's seats from which on requests are refused with 429.
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
        # of its own: requests without a grammar do not wait for one that takes long to compile
        self._grammars = ThreadPoolExecutor(2, thread_name_prefix="batchinfer-grammar")
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.watch(lambda: self.engine.snapshot)

    def start(self) -> None:
        """Call within the asyncio loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def stop(self) -> None:
        self.engine.stop()
        for pool in (self._pool, self._grammars):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def failure(self) -> str | None:
        """Why the engine answers nothing any more, if so."""
        return self.engine.failure

    @property
    def open_samples(self) -> int:
        return len(self._generations)

    # -- a request's way in -------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Raises ApiError where the engine is dead (500) or the queue full (429)."""
        if self.failure is not None:
            raise ApiError(500, f"the engine stopped: {self.failure}", code="engine_failure")
        waiting = len(self._generations) - self._seats
        if waiting >= self._max_waiting:
            wait_s = round(self.metrics.mean_request_s * waiting / self._seats)
            raise ApiError(
                429,
                f"{waiting} sequences are waiting already: try again later",
                code="queue_full",
                retry_after_s=min(max(wait_s, 1), _RETRY_LONGEST_S),
            )

    async def in_pool(self, work: Callable[[], T]) -> T:
        """Run work that takes a while beside the asyncio loop. Raises ApiError for a RowError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RowError as error:
            raise of_row(error) from None

    async def encode(self, asked: ParsedRequest) -> list[list[int]]:
        """Token ids of what is asked, rendered by the chat template where it is messages. Raises ApiError."""
        return await self.in_pool(lambda: self.tokens_of(asked.contents, asked.options))

    async def prepare(self, prompts: Sequence[list[int]], asked: ParsedRequest) -> list[Prepared]:
        """Check token ids and parameters against the model. Raises ApiError for the first prompt that is wrong."""
        if asked.params.structured_outputs is not None and asked.pooling is None:
            compile_ = self.model.parts.preparer.compile_grammar
            await asyncio.get_running_loop().run_in_executor(self._grammars, lambda: compile_(asked.params))
        return await self.in_pool(lambda: self._prepare(prompts, asked))

    def _prepare(self, prompts: Sequence[list[int]], asked: ParsedRequest) -> list[Prepared]:
        key = random.getrandbits(64)
        wanted = [
            Prompt(index, [ids], asked.params, mix(key, index), read=asked.pooling, options=asked.options)
            for index, ids in enumerate(prompts)
        ]
        return [_sound(result) for result in self.model.parts.preparer.prepare(wanted)]

    def tokens_of(self, contents: Sequence[Content], options: PromptOptions) -> list[list[int]]:
        """Token ids of prompts of one kind; runs in the pool. Raises RowError."""
        encoder = self.model.encoder
        made = [_right(encoder.text(content, options)) for content in contents]
        texts = [text.text for text in made if isinstance(text, Text)]
        if texts:
            return [_right(ids) for ids in encoder.encode(texts, options.special)]
        return [ids for ids in made if isinstance(ids, list)]

    def open(self, prepared: list[Prepared], stream: bool) -> Generation:
        """Hand requests to the engine."""
        self.admit()
        generation = Generation(prepared)
        for request_id in generation.open:
            self._generations[request_id] = generation
        requests: list[Request] = [request for one in prepared for request in one.requests]
        self.engine.submit(requests, stream)
        return generation

    def close(self, generation: Generation) -> None:
        """Forget a generation; what of it still runs is aborted before the next step."""
        left = list(generation.open)
        for request_id in left:
            self._generations.pop(request_id, None)
        generation.open.clear()
        if left:
            self.engine.abort(left)

    def fail_all(self, error: ApiError) -> None:
        """End all open generations with `error`."""
        for generation in {id(one): one for one in self._generations.values()}.values():
            generation.fail(error)

    # -- other threads' requests --------------------------------------------------------------------------------

    def lend(self, request: Request, taker: EventSink) -> None:
        """Run a request for another thread; `taker` gets its events in the asyncio thread."""

        def begin() -> None:
            if self.failure is not None:
                taker.fail(ApiError(500, f"the engine stopped: {self.failure}", code="engine_failure"))
                return
            self._generations[request.request_id] = taker
            self.engine.submit([request], False)

        self._soon(begin)

    def take_back(self, request_id: int) -> None:
        """Drop a request that was lent."""

        def end() -> None:
            if self._generations.pop(request_id, None) is not None:
                self.engine.abort([request_id])

        self._soon(end)

    # -- the engine's way out -----------------------------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        self._soon(lambda: self._dispatch(events))

    def _failed(self, reason: str) -> None:
        self._soon(lambda: self.fail_all(ApiError(500, f"the engine stopped: {reason}", code="engine_failure")))

    def _soon(self, work: Callable[[], None]) -> None:
        """From the engine thread into the asyncio loop, unless that has ended."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            generation = self._generations.get(event.request_id)
            if generation is None:  # closed meanwhile
                continue
            if event.finished is not None:
                del self._generations[event.request_id]
            generation.add_event(event)


def _right(found: T | RowError) -> T:
    if isinstance(found, RowError):
        raise found
    return found


def _sound(result: Prepared | Refused) -> Prepared:
    if isinstance(result, Refused):
        raise result.error
    return result
