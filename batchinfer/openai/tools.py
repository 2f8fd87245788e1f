"""Tools of one chat: what tool_choice forces the answer to be, and tool calls read back from its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from batchinfer.errors import BadParameters
from batchinfer.openai.json_text import dump_json
from batchinfer.openai.request_models import ChatRequest
from batchinfer.text.tool_choice import tool_choice_schema
from batchinfer.text.tools import ToolCallParser, ToolDelta, detect_format, keeps_special_tokens, parse_tool_calls

NewId = Callable[[], str]
"""Makes the id of a tool call."""


class Call(NamedTuple):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class ParsedAnswer(NamedTuple):
    """Text beside the calls, and the calls."""

    content: str
    calls: list[Call]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How to read an answer. auto: calls in the model's own format; one, many: the whole text is JSON that was forced.

    `constraint` is what structured_outputs must be for a call that tool_choice forces.
    """

    mode: Literal["auto", "one", "many"]
    format: str | None = None
    name: str = ""
    constraint: dict[str, Any] | None = None
    only_first: bool = False

    @property
    def keeps_special(self) -> bool:
        """Whether special tokens mark calls, and must stay in the text."""
        return self.format is not None and keeps_special_tokens(self.format)

    def read(self, text: str) -> ParsedAnswer:
        """What a finished answer says. Text that is no call stays text."""
        if self.mode == "auto":
            content, calls = parse_tool_calls(text, self.format) if self.format else (text, [])
            return self._said(content or "", [Call(call.name, call.arguments) for call in calls])
        if self.mode == "one":
            return self._said("", [Call(self.name, text)])
        try:
            calls_of = json.loads(text)  # integers of any size stay what they are
            return self._said("", [Call(one["name"], dump_json(one["parameters"]).decode()) for one in calls_of])
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off by max_tokens
            return ParsedAnswer(text, [])

    def _said(self, content: str, calls: list[Call]) -> ParsedAnswer:
        return ParsedAnswer(content, calls[:1] if self.only_first else calls)


class ToolStream:
    """The same for an answer that is being written: deltas as the wire has them."""

    def __init__(self, use: ToolUse, new_id: NewId) -> None:
        self._use = use
        self._new_id = new_id
        self._parser = ToolCallParser(use.format) if use.mode == "auto" and use.format else None
        self._text = ""  # of an answer that is read when it is complete
        self.called = False

    def push(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Deltas for more text; `last`: there is no more."""
        if self._parser is not None:
            pieces = self._parser.feed(text) + (self._parser.finish() if last else [])
            return [self._delta(piece) for piece in pieces if not (self._use.only_first and piece.index)]
        if self._use.mode == "auto":
            return [{"content": text}] if text else []
        self._text += text
        if not last:
            return []
        said = self._use.read(self._text)
        self.called = bool(said.calls)
        deltas: list[dict[str, Any]] = [{"content": said.content}] if said.content else []
        calls = [wire_call(call, self._new_id) for call in said.calls]
        return deltas + [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(calls)]

    def _delta(self, piece: ToolDelta) -> dict[str, Any]:
        if piece.index is None:
            return {"content": piece.content}
        self.called = True
        if piece.name is None:
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
        call = wire_call(Call(piece.name, piece.arguments), self._new_id)
        return {"tool_calls": [{"index": piece.index, **call}]}


def wire_call(call: Call, new_id: NewId) -> dict[str, Any]:
    return {"id": new_id(), "type": "function", "function": call._asdict()}


def parse_tool_use(body: ChatRequest, chat_template: str | None) -> ToolUse | None:
    """None without tools, or where tool_choice is none. Raises BadParameters."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise BadParameters("tool_choice needs tools", param="tool_choice")
        return None
    only_first = body.parallel_tool_calls is False
    dialect = detect_format(chat_template or "")
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolUse("auto", dialect, only_first=only_first)
    try:
        forced = tool_choice_schema(body.tools, choice, dialect, parallel=not only_first)
    except BadParameters as error:
        raise BadParameters(str(error), param="tool_choice") from None
    if dialect is not None:
        return ToolUse("auto", dialect, constraint=forced, only_first=only_first)
    if isinstance(choice, dict):
        return ToolUse("one", name=choice["function"]["name"], constraint=forced)
    return ToolUse("many", constraint=forced, only_first=only_first)
