"""Responses that outlive no client: work that stops when the client goes away, and server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from batchinfer.openai.delta import Delta, Used
from batchinfer.openai.json_text import dump_json
from batchinfer.server.errors import ApiError, as_api_error
from batchinfer.server.metrics import Metrics

T = TypeVar("T")

CLIENT_GONE = 499  # as nginx counts it; nobody receives it
_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Reply(Protocol):
    """How an answer is written: whole, or as it comes, in server-sent events."""

    done: bytes
    """What ends a stream, whatever its end is."""

    def whole(self, deltas: list[Delta], used: Used) -> dict[str, Any]: ...

    def more(self, deltas: list[Delta], used: Used) -> bytes:
        """Events; none where there is nothing to show yet."""
        ...

    def end(self, used: Used) -> bytes:
        """The last events of an answer that is complete."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last events of one that breaks off."""
        ...


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event, which may have a name."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + dump_json(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events: what `chunks` yields, and what ends a `reply`; an error becomes an event before that.

    first: what was already taken from `chunks`. close: called once at the end, whatever the end is.
    """

    def __init__(
        self,
        first: bytes,
        chunks: AsyncGenerator[bytes, None],
        reply: Reply,
        close: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        super().__init__(status_code=200)
        self.raw_headers = list(_HEAD)
        self._first = first
        self._chunks = chunks
        self._reply = reply
        self._close = close
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except (ClientGone, OSError):  # OSError: what some servers raise from `send` then
            self._metrics.disconnected()
        finally:
            await self._chunks.aclose()
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for chunk in self._chunks:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            known = as_api_error(error)
            self._metrics.error(known.status)
            await send({"type": "http.response.body", "body": self._reply.failure(known), "more_body": True})
        await send({"type": "http.response.body", "body": self._reply.done, "more_body": False})
