"""Response of /v1/messages: one object, or the stream events that build it, in the order that Anthropic documents.

See https://docs.anthropic.com/en/api/messages and https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from batchinfer.openai.content_blocks import BlockEvent, ContentBlock, ContentBlocks, ResponseHead
from batchinfer.openai.delta import Delta, TokenUsage
from batchinfer.openai.parse import ParsedRequest


class MessageEvents:
    """Writer of one message, whole or as stream events. new_id: returns a new id with a prefix (toolu)."""

    def __init__(self, request: ParsedRequest, head: ResponseHead, new_id: Callable[[str], str]) -> None:
        self._head = head
        self._max_tokens = request.params.max_tokens
        self._blocks = ContentBlocks(request.tool_use, lambda: new_id("toolu"))
        self._last: Delta | None = None

    def whole_response(self, delta: Delta, usage: TokenUsage) -> dict[str, Any]:
        self._last = delta
        blocks = self._blocks.split_answer(delta)
        return {
            **self._message([_content(block) for block in blocks]),
            **self._stop_fields(usage),
            "usage": _usage_object(usage),
        }

    def opening_events(self, usage: TokenUsage) -> list[dict[str, Any]]:
        opened = {
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage_object(usage._replace(completion_tokens=0)),
        }
        return [{"type": "message_start", "message": {**self._message([]), **opened}}, {"type": "ping"}]

    def delta_events(self, delta: Delta) -> list[dict[str, Any]]:
        self._last = delta
        return [_stream_event(event) for event in self._blocks.push_delta(delta)]

    def closing_events(self, usage: TokenUsage) -> list[dict[str, Any]]:
        return [
            {"type": "message_delta", "delta": self._stop_fields(usage), "usage": _usage_object(usage)},
            {"type": "message_stop"},
        ]

    def error_events(self, message: str) -> list[dict[str, Any]]:
        return [{"type": "error", "error": {"type": "api_error", "message": message}}]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._head.id, "type": "message", "role": "assistant", "model": self._head.model}
        return {**head, "content": content}

    def _stop_fields(self, usage: TokenUsage) -> dict[str, Any]:
        """Return why the answer ended."""
        last = self._last
        assert last is not None, "closing_events needs a delta"
        if last.finish_reason == "length":
            reason = "max_tokens" if usage.completion_tokens == self._max_tokens else "model_context_window_exceeded"
        elif self._blocks.called:
            reason = "tool_use"
        else:
            reason = "end_turn" if last.stop_string is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": last.stop_string if reason == "stop_sequence" else None}


def _stream_event(event: BlockEvent) -> dict[str, Any]:
    block = event.block
    if event.kind == "close":
        return {"type": "content_block_stop", "index": block.number}
    if event.kind == "open":
        empty = _content(ContentBlock(block.number, block.name, block.call_id))  # the block may have text by now
        return {"type": "content_block_start", "index": block.number, "content_block": empty}
    kind, field = ("text_delta", "text") if block.name is None else ("input_json_delta", "partial_json")
    return {"type": "content_block_delta", "index": block.number, "delta": {"type": kind, field: event.text}}


def _content(block: ContentBlock) -> dict[str, Any]:
    if block.name is None:
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """Return the arguments as an object; empty if max_tokens cut them off."""
    try:
        value = json.loads(arguments)  # the standard parser, which keeps integers of any size
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _usage_object(usage: TokenUsage) -> dict[str, Any]:
    """Return the `usage` object; cached tokens count as input, because no cache breakpoint asked for them."""
    cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": usage.prompt_tokens, **cache, "output_tokens": usage.completion_tokens}
