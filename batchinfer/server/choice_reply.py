"""Replies of completions and chats, with `choices`: one body, or chunks that end with `[DONE]`."""

from __future__ import annotations

import secrets
import time
from typing import Any, Protocol

from batchinfer.openai.delta import Delta, TokenUsage, usage_object
from batchinfer.openai.request_models import SamplingBody
from batchinfer.server.errors import ApiError
from batchinfer.server.sse import sse_event


class ChoiceWriter(Protocol):
    """Format of choices: the part of a reply that differs between completions and chats.

    object_name, chunk_object_name: `object` of a whole reply and of a chunk. id_prefix: of the reply's id.
    first_chunk_fields: further fields of the first chunk.
    """

    object_name: str
    chunk_object_name: str
    id_prefix: str
    first_chunk_fields: dict[str, Any]

    def whole_choices(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the choices of a complete answer, one per delta, and further fields of the reply."""
        ...

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the choices of chunks, one per chunk; empty while all new text is held back."""
        ...


class ChoiceReply:
    """Reply of /v1/completions and /v1/chat/completions, whole or streamed."""

    done = b"data: [DONE]\n\n"

    def __init__(self, writer: ChoiceWriter, model_name: str, body: SamplingBody) -> None:
        self._writer = writer
        reply_id = f"{writer.id_prefix}-{secrets.token_hex(12)}"
        self._head = {"id": reply_id, "object": writer.object_name, "created": int(time.time()), "model": model_name}
        options = body.stream_options
        self._usage_at_end = options is not None and bool(options.include_usage)
        self._usage_always = self._usage_at_end and options is not None and bool(options.continuous_usage_stats)
        self._first_chunk_fields = writer.first_chunk_fields

    def whole_body(self, deltas: list[Delta], usage: TokenUsage) -> dict[str, Any]:
        choices, fields = self._writer.whole_choices(deltas)
        return {**self._head, "choices": choices, "usage": usage_object(usage), **fields}

    def stream_events(self, deltas: list[Delta], usage: TokenUsage) -> bytes:
        current = usage_object(usage) if self._usage_always else None
        choices = [choice for delta in deltas for choice in self._writer.chunk_choices(delta)]
        return b"".join([self._chunk([choice], current) for choice in choices])

    def end_events(self, usage: TokenUsage) -> bytes:
        return self._chunk([], usage_object(usage)) if self._usage_at_end else b""

    def error_events(self, error: ApiError) -> bytes:
        return sse_event(error.body())

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        fields, self._first_chunk_fields = self._first_chunk_fields, {}
        chunk = {**self._head, "object": self._writer.chunk_object_name, "choices": choices, "usage": usage, **fields}
        return sse_event(chunk)
