"""Tool calling in one chat: the constraint that tool_choice sets, and parsing tool calls from generated text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from batchinfer.errors import BadParameters
from batchinfer.openai.json_text import dump_json
from batchinfer.openai.request_models import ChatRequest
from batchinfer.text.tool_choice import tool_choice_schema
from batchinfer.text.tools import (
    ToolCall,
    ToolCallParser,
    ToolDelta,
    detect_format,
    keeps_special_tokens,
    parse_tool_calls,
)

NewId = Callable[[], str]
"""Returns the id of a new tool call."""


class ParsedAnswer(NamedTuple):
    """Generated text split into text content and tool calls."""

    content: str
    calls: list[ToolCall]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Parser settings for tool calls in generated text.

    mode: `auto` parses calls in the model's own `format`; `one` and `many` expect the whole text to be JSON that the
    grammar of tool_choice enforced, the arguments of the function `name` or a list of calls. constraint: the
    structured_outputs that enforce it. only_first: drop calls after the first.
    """

    mode: Literal["auto", "one", "many"]
    format: str | None = None
    name: str = ""
    constraint: dict[str, Any] | None = None
    only_first: bool = False

    @property
    def keeps_special(self) -> bool:
        """Return True if special tokens mark calls, so that detokenizing must keep them."""
        return self.format is not None and keeps_special_tokens(self.format)

    def parse_answer(self, text: str) -> ParsedAnswer:
        """Split the complete text into content and calls; text that is no call stays content."""
        if self.mode == "auto":
            content, calls = parse_tool_calls(text, self.format) if self.format else (text, [])
            return self._limit(content or "", calls)
        if self.mode == "one":
            return self._limit("", [ToolCall(self.name, text)])
        try:
            calls_of = json.loads(text)  # the standard parser, which keeps integers of any size
            calls = [ToolCall(call["name"], dump_json(call["parameters"]).decode()) for call in calls_of]
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off by max_tokens
            return ParsedAnswer(text, [])
        return self._limit("", calls)

    def _limit(self, content: str, calls: list[ToolCall]) -> ParsedAnswer:
        return ParsedAnswer(content, calls[:1] if self.only_first else calls)


def parse_answer(tool_use: ToolUse | None, text: str) -> ParsedAnswer:
    """Split the complete text of a sample; without tools it is all content."""
    return ParsedAnswer(text, []) if tool_use is None else tool_use.parse_answer(text)


class ToolStream:
    """Incremental parser of tool calls: generated text in, `delta` objects of chat chunks out."""

    def __init__(self, tool_use: ToolUse, new_id: NewId) -> None:
        self._tool_use = tool_use
        self._new_id = new_id
        self._parser = ToolCallParser(tool_use.format) if tool_use.mode == "auto" and tool_use.format else None
        self._text = ""  # buffered until the end if the text is parsed as a whole
        self.called = False

    def push_text(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Return the deltas that more text makes; `last`: the text is complete."""
        if self._parser is not None:
            pieces = self._parser.feed(text) + (self._parser.finish() if last else [])
            return [self._delta(piece) for piece in pieces if not (self._tool_use.only_first and piece.index)]
        if self._tool_use.mode == "auto":
            return [{"content": text}] if text else []
        self._text += text
        if not last:
            return []
        answer = self._tool_use.parse_answer(self._text)
        self.called = bool(answer.calls)
        deltas: list[dict[str, Any]] = [{"content": answer.content}] if answer.content else []
        calls = [tool_call_object(call, self._new_id) for call in answer.calls]
        return deltas + [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(calls)]

    def _delta(self, piece: ToolDelta) -> dict[str, Any]:
        if piece.index is None:
            return {"content": piece.content}
        self.called = True
        if piece.name is None:
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
        call = tool_call_object(ToolCall(piece.name, piece.arguments), self._new_id)
        return {"tool_calls": [{"index": piece.index, **call}]}


def tool_call_object(call: ToolCall, new_id: NewId) -> dict[str, Any]:
    """Return an item of a message's `tool_calls`."""
    return {"id": new_id(), "type": "function", "function": call._asdict()}


def parse_tool_use(body: ChatRequest, chat_template: str | None) -> ToolUse | None:
    """Return how the chat's tool calls are parsed; None without tools or with tool_choice none. Raises BadParameters.

    The model's own call format is the one that its chat template shows.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise BadParameters("tool_choice needs tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    only_first = body.parallel_tool_calls is False
    dialect = detect_format(chat_template or "")
    if choice in (None, "auto"):
        return ToolUse("auto", dialect, only_first=only_first)
    try:
        constraint = tool_choice_schema(body.tools, choice, dialect, parallel=not only_first)
    except BadParameters as error:
        raise BadParameters(str(error), param="tool_choice") from None
    if dialect is not None:
        return ToolUse("auto", dialect, constraint=constraint, only_first=only_first)
    if isinstance(choice, dict):
        return ToolUse("one", name=choice["function"]["name"], constraint=constraint)
    return ToolUse("many", constraint=constraint, only_first=only_first)
