"""Replies in named events, as /v1/responses and /v1/messages have them: the wire's answer, as bytes."""

from __future__ import annotations

from typing import Any, Protocol

from batchinfer.openai.delta import Delta, Used
from batchinfer.server.errors import ApiError
from batchinfer.server.stream import event


class Answer(Protocol):
    """One answer, whole or as it comes: events are values whose `type` is their name."""

    def whole(self, delta: Delta, used: Used) -> dict[str, Any]: ...

    def opening(self, used: Used) -> list[dict[str, Any]]: ...

    def more(self, delta: Delta) -> list[dict[str, Any]]: ...

    def closing(self, used: Used) -> list[dict[str, Any]]: ...

    def failed(self, message: str) -> list[dict[str, Any]]: ...


class Events:
    """The first events come with the first tokens."""

    done = b""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._begun = False

    def whole(self, deltas: list[Delta], used: Used) -> dict[str, Any]:
        (delta,) = deltas
        return self._answer.whole(delta, used)

    def more(self, deltas: list[Delta], used: Used) -> bytes:
        opening = [] if self._begun else self._answer.opening(used)
        self._begun = True
        return _named([*opening, *(one for delta in deltas for one in self._answer.more(delta))])

    def end(self, used: Used) -> bytes:
        return _named(self._answer.closing(used))

    def failure(self, error: ApiError) -> bytes:
        return _named(self._answer.failed(error.message))


def _named(events: list[dict[str, Any]]) -> bytes:
    return b"".join([event(one, one["type"]) for one in events])
