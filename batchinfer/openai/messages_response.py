"""The answer of /v1/messages: one object, or the events that build it, in the order of Anthropic's documentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from batchinfer.openai.content_blocks import ContentBlock, ContentBlocks, Head, Step
from batchinfer.openai.delta import Delta, Used
from batchinfer.openai.parse import ParsedRequest


class MessageAnswer:
    """new_id: makes an id from its prefix (toolu)."""

    def __init__(self, asked: ParsedRequest, head: Head, new_id: Callable[[str], str]) -> None:
        self._head = head
        self._max_tokens = asked.params.max_tokens
        self._blocks = ContentBlocks(asked.tool_use, lambda: new_id("toolu"))
        self._last: Delta | None = None

    def whole(self, delta: Delta, used: Used) -> dict[str, Any]:
        self._last = delta
        blocks = self._blocks.whole(delta)
        return {**self._message([_content(block) for block in blocks]), **self._end(used), "usage": _usage(used)}

    def opening(self, used: Used) -> list[dict[str, Any]]:
        begun = {"stop_reason": None, "stop_sequence": None, "usage": _usage(used._replace(answer=0))}
        return [{"type": "message_start", "message": {**self._message([]), **begun}}, {"type": "ping"}]

    def more(self, delta: Delta) -> list[dict[str, Any]]:
        self._last = delta
        return [_event(step) for step in self._blocks.push(delta)]

    def closing(self, used: Used) -> list[dict[str, Any]]:
        return [{"type": "message_delta", "delta": self._end(used), "usage": _usage(used)}, {"type": "message_stop"}]

    def failed(self, message: str) -> list[dict[str, Any]]:
        return [{"type": "error", "error": {"type": "api_error", "message": message}}]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._head.id, "type": "message", "role": "assistant", "model": self._head.model}
        return {**head, "content": content}

    def _end(self, used: Used) -> dict[str, Any]:
        """Why the answer ends."""
        last = self._last
        assert last is not None, "an answer has an end"
        if last.reason == "length":
            reason = "max_tokens" if used.answer == self._max_tokens else "model_context_window_exceeded"
        elif self._blocks.called:
            reason = "tool_use"
        else:
            reason = "end_turn" if last.stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": last.stop if reason == "stop_sequence" else None}


def _event(step: Step) -> dict[str, Any]:
    block = step.block
    if step.what == "close":
        return {"type": "content_block_stop", "index": block.number}
    if step.what == "open":
        empty = _content(ContentBlock(block.number, block.name, block.call_id))  # by now it may hold more
        return {"type": "content_block_start", "index": block.number, "content_block": empty}
    kind, field = ("text_delta", "text") if block.name is None else ("input_json_delta", "partial_json")
    return {"type": "content_block_delta", "index": block.number, "delta": {"type": kind, field: step.text}}


def _content(block: ContentBlock) -> dict[str, Any]:
    if block.name is None:
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """Of a call that was cut off nothing is left."""
    try:
        given = json.loads(arguments)  # integers of any size stay what they are
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _usage(used: Used) -> dict[str, Any]:
    """What the prefix cache held counts as input: nobody marked it."""
    cache = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": used.prompt, **cache, "output_tokens": used.answer}
