"""Replies of /v1/responses and /v1/messages: one body, or named server-sent events."""

from __future__ import annotations

from typing import Any, Protocol

from batchinfer.openai.delta import Delta, TokenUsage
from batchinfer.server.errors import ApiError
from batchinfer.server.sse import sse_event


class EventWriter(Protocol):
    """Format of one answer, whole or as events; an event is a JSON object whose `type` is the event's name."""

    def whole_response(self, delta: Delta, usage: TokenUsage) -> dict[str, Any]: ...

    def opening_events(self, usage: TokenUsage) -> list[dict[str, Any]]: ...

    def delta_events(self, delta: Delta) -> list[dict[str, Any]]: ...

    def closing_events(self, usage: TokenUsage) -> list[dict[str, Any]]: ...

    def error_events(self, message: str) -> list[dict[str, Any]]: ...


class EventReply:
    """Reply of one sample, whole or streamed. The opening events are sent with the first tokens."""

    done = b""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._opened = False

    def whole_body(self, deltas: list[Delta], usage: TokenUsage) -> dict[str, Any]:
        (delta,) = deltas
        return self._writer.whole_response(delta, usage)

    def stream_events(self, deltas: list[Delta], usage: TokenUsage) -> bytes:
        opening = [] if self._opened else self._writer.opening_events(usage)
        self._opened = True
        return _named_events([*opening, *(event for delta in deltas for event in self._writer.delta_events(delta))])

    def end_events(self, usage: TokenUsage) -> bytes:
        return _named_events(self._writer.closing_events(usage))

    def error_events(self, error: ApiError) -> bytes:
        return _named_events(self._writer.error_events(error.message))


def _named_events(events: list[dict[str, Any]]) -> bytes:
    return b"".join([sse_event(event, event["type"]) for event in events])
