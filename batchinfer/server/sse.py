"""Server-sent events, and cancelling work when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from batchinfer.openai.delta import Delta, TokenUsage
from batchinfer.openai.json_text import dump_json
from batchinfer.server.errors import ApiError, as_api_error
from batchinfer.server.metrics import Metrics

T = TypeVar("T")

CLIENT_DISCONNECTED = 499  # nginx's status for it, counted in metrics; nobody receives it
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Reply(Protocol):
    """Format of a reply: one body, or server-sent events. `done` ends a stream, whether complete or broken off."""

    done: bytes

    def whole_body(self, deltas: list[Delta], usage: TokenUsage) -> dict[str, Any]: ...

    def stream_events(self, deltas: list[Delta], usage: TokenUsage) -> bytes:
        """Return the events of new deltas; empty while all new text is held back."""
        ...

    def end_events(self, usage: TokenUsage) -> bytes:
        """Return the last events of a complete answer."""
        ...

    def error_events(self, error: ApiError) -> bytes:
        """Return the last events of an answer that breaks off."""
        ...


class ClientDisconnected(Exception):
    """The client closed its connection before the reply was complete."""


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it and raise ClientDisconnected if the client disconnects first."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse_event(value: Any, name: str = "") -> bytes:
    """Return one server-sent event with `value` as JSON, named if `name` is given."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + dump_json(value) + b"\n\n"


class EventStreamResponse(Response):
    """Streaming response: `first` and `chunks`, then `reply.done`; an error on the way is sent as an event.

    first: the chunk that was already taken from `chunks`. close: called once when the stream ends, however it ends.
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
        self.raw_headers = list(_HEADERS)
        self._first = first
        self._chunks = chunks
        self._reply = reply
        self._close = close
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(receive, self._send_events(send))
        except (ClientDisconnected, OSError):  # some servers raise OSError from `send` when the client is gone
            self._metrics.count_disconnect()
        finally:
            await self._chunks.aclose()
            self._close()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for chunk in self._chunks:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            api_error = as_api_error(error)
            self._metrics.count_error(api_error.status)
            await send({"type": "http.response.body", "body": self._reply.error_events(api_error), "more_body": True})
        await send({"type": "http.response.body", "body": self._reply.done, "more_body": False})
