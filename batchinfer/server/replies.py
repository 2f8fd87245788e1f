"""How a request is answered, whatever its route: prepare, run, reply as JSON or a stream, stop if the client goes."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.prompting import Prepared
from batchinfer.server.errors import ApiError, JsonResponse
from batchinfer.server.frontend import Frontend
from batchinfer.server.samples import Samples
from batchinfer.server.stream import CLIENT_GONE, ClientGone, EventStream, event, unless_gone
from batchinfer.wire.answers import usage
from batchinfer.wire.bodies import SamplingBody
from batchinfer.wire.choices import Delta


class Shape(Protocol):
    """What differs between routes: how a choice looks."""

    kind: str
    """`object` of a whole answer."""
    chunk_kind: str
    """`object` of a chunk."""
    prefix: str
    """Of ids."""
    opening: dict[str, Any]
    """What the first chunk has besides."""

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The choices, one for each delta, and further fields of the answer."""
        ...

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """Choices of chunks; none where there is nothing to show yet."""
        ...


class Answering(Protocol):
    """`Samples`, or what stands in for them where nothing is generated."""

    def batches(self) -> AsyncIterator[list[Delta]]: ...

    async def whole(self) -> list[Delta]: ...

    def usage(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready to run. `live`: its chunks leave step by step; else when their samples have ended.

    `nothing`: it asks for no tokens, and the engine is not asked for any.
    """

    shape: Shape
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

    def usage(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, 0, 0)

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
    frontend: Frontend, receive: Receive, body: SamplingBody, prepare: Callable[[], Awaitable[Work]]
) -> Response:
    """Answer a completion or a chat. Raises ApiError for what is wrong before the first byte of an answer."""
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def begin() -> Response:
        work = await prepare()
        head = _head(work.shape, name)
        samples: Answering
        if work.nothing:
            samples = Nothing(work.prepared)
        else:
            samples = Samples(frontend, work.prepared, bool(body.stream) and work.live, arrived_s)
        if body.stream:
            return await _stream(frontend, samples, _chunks(work, samples, head, body))
        try:
            choices, more = work.shape.whole(await samples.whole())
        finally:
            samples.close()
        return JsonResponse({**head, "object": work.shape.kind, "choices": choices, "usage": samples.usage(), **more})

    return await answer(frontend, receive, begin)


async def answer(frontend: Frontend, receive: Receive, begin: Callable[[], Any]) -> Response:
    """The response of `begin`, which is cancelled if the client goes away."""
    try:
        response: Response = await unless_gone(receive, begin())
    except ClientGone:
        frontend.metrics.disconnected()
        return Response(status_code=CLIENT_GONE)
    return response


async def _stream(frontend: Frontend, samples: Answering, chunks: AsyncGenerator[bytes, None]) -> Response:
    """Waits for the first chunk: what fails before it is still an error with a status."""
    try:
        first = await anext(chunks, b"")
    except BaseException:
        samples.close()
        raise
    return EventStream(first, chunks, samples.close, frontend.metrics)


async def _chunks(
    work: Work, samples: Answering, head: dict[str, Any], body: SamplingBody
) -> AsyncGenerator[bytes, None]:
    shape, options = work.shape, body.stream_options
    counted = options is not None and bool(options.include_usage)
    always = counted and options is not None and bool(options.continuous_usage_stats)
    head, opening = {**head, "object": shape.chunk_kind}, shape.opening
    async for deltas in samples.batches() if work.live else _at_once(samples):
        now = samples.usage() if always else None
        choices = [choice for delta in deltas for choice in shape.pieces(delta)]
        if choices:
            chunks = [{**head, "choices": [choice], "usage": now} for choice in choices]
            chunks[0] |= opening
            opening = {}
            yield b"".join([event(chunk) for chunk in chunks])
    if counted:
        yield event({**head, "choices": [], "usage": samples.usage()})


async def _at_once(samples: Answering) -> AsyncIterator[list[Delta]]:
    yield await samples.whole()


def _head(shape: Shape, name: str) -> dict[str, Any]:
    number = f"{shape.prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": shape.kind, "created": int(time.time()), "model": name}
