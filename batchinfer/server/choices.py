"""Replies with `choices`, as completions and chats have them: one body, or chunks and then `[DONE]`."""

from __future__ import annotations

import secrets
import time
from typing import Any, Protocol

from batchinfer.openai.delta import Delta, Used, usage
from batchinfer.openai.request_models import SamplingBody
from batchinfer.server.errors import ApiError
from batchinfer.server.stream import event


class Shape(Protocol):
    """What differs between the two: how a choice looks."""

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


class Choices:
    """name: the model's, to sign with."""

    done = b"data: [DONE]\n\n"

    def __init__(self, shape: Shape, name: str, body: SamplingBody) -> None:
        self._shape = shape
        number = f"{shape.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": number, "object": shape.kind, "created": int(time.time()), "model": name}
        options = body.stream_options
        self._counts = options is not None and bool(options.include_usage)
        self._counts_always = self._counts and options is not None and bool(options.continuous_usage_stats)
        self._opening = shape.opening

    def whole(self, deltas: list[Delta], used: Used) -> dict[str, Any]:
        choices, more = self._shape.whole(deltas)
        return {**self._head, "choices": choices, "usage": usage(used), **more}

    def more(self, deltas: list[Delta], used: Used) -> bytes:
        now = usage(used) if self._counts_always else None
        return b"".join(
            [self._chunk([choice], now) for delta in deltas for choice in self._shape.pieces(delta)],
        )

    def end(self, used: Used) -> bytes:
        return self._chunk([], usage(used)) if self._counts else b""

    def failure(self, error: ApiError) -> bytes:
        return event(error.body())

    def _chunk(self, choices: list[dict[str, Any]], now: dict[str, Any] | None) -> bytes:
        opening, self._opening = self._opening, {}
        return event({**self._head, "object": self._shape.chunk_kind, "choices": choices, "usage": now, **opening})
