"""How a request is answered, whatever its route: prepare, run, reply as JSON or a stream, stop if the client goes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.openai.delta import Delta, Used
from batchinfer.openai.request_models import SamplingBody
from batchinfer.pipeline.prompt import Prepared
from batchinfer.server.errors import ApiError, JsonResponse
from batchinfer.server.frontend import Frontend
from batchinfer.server.samples import Samples
from batchinfer.server.stream import CLIENT_GONE, ClientGone, EventStream, Reply, unless_gone


class Answering(Protocol):
    """`Samples`, or what stands in for them where nothing is generated."""

    def batches(self) -> AsyncIterator[list[Delta]]: ...

    async def whole(self) -> list[Delta]: ...

    def used(self) -> Used: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ReplyWork:
    """A request that is ready to run. `live`: its events leave step by step; else when their samples have ended.

    `nothing`: it asks for no tokens, and the engine is not asked for any.
    """

    reply: Reply
    prepared: list[Prepared]
    live: bool = True
    nothing: bool = False


class Nothing:
    """Samples of no tokens."""

    def __init__(self, prepared: list[Prepared]) -> None:
        self._prompt_tokens = sum(len(one.ids) for one in prepared)
        count = sum(len(one.requests) for one in prepared)
        self._deltas = [Delta(choice, "", [], [], "length", True) for choice in range(count)]

    async def batches(self) -> AsyncIterator[list[Delta]]:
        yield self._deltas

    async def whole(self) -> list[Delta]:
        return self._deltas

    def used(self) -> Used:
        return Used(self._prompt_tokens, 0, 0)

    def close(self) -> None:
        """Nothing runs."""


def check_model(frontend: Frontend, name: str | None) -> str:
    """The name to sign with. Raises ApiError for a model that is not served here."""
    names = frontend.model.names
    if name is not None and name not in names:
        message = f"no model {name!r} is served here, only {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name or names[0]


async def respond(
    frontend: Frontend, receive: Receive, body: SamplingBody, prepare: Callable[[str], Awaitable[ReplyWork]]
) -> Response:
    """Answer a request for tokens; `prepare` gets the name to sign with.

    Raises ApiError, RowError for what is wrong before the first byte of an answer.
    """
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def begin() -> Response:
        work = await prepare(name)
        samples: Answering
        if work.nothing:
            samples = Nothing(work.prepared)
        else:
            samples = Samples(frontend, work.prepared, bool(body.stream) and work.live, arrived_s)
        if body.stream:
            return await _stream(frontend, work, samples)
        try:
            deltas = await samples.whole()
        finally:
            samples.close()
        answer: dict[str, Any] = work.reply.whole(deltas, samples.used())
        return JsonResponse(answer)

    return await answer(frontend, receive, begin)


async def answer(frontend: Frontend, receive: Receive, begin: Callable[[], Any]) -> Response:
    """The response of `begin`, which is cancelled if the client goes away."""
    try:
        response: Response = await unless_gone(receive, begin())
    except ClientGone:
        frontend.metrics.disconnected()
        return Response(status_code=CLIENT_GONE)
    return response


async def _stream(frontend: Frontend, work: ReplyWork, samples: Answering) -> Response:
    """Waits for the first events: what fails before them is still an error with a status."""
    chunks = _chunks(work, samples)
    try:
        first = await anext(chunks, b"")
    except BaseException:
        samples.close()
        raise
    return EventStream(first, chunks, work.reply, samples.close, frontend.metrics)


async def _chunks(work: ReplyWork, samples: Answering) -> AsyncGenerator[bytes, None]:
    async for deltas in samples.batches() if work.live else _at_once(samples):
        chunk = work.reply.more(deltas, samples.used())
        if chunk:
            yield chunk
    yield work.reply.end(samples.used())


async def _at_once(samples: Answering) -> AsyncIterator[list[Delta]]:
    yield await samples.whole()
