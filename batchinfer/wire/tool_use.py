"""Tools of one chat: what tool_choice forces the answer to be, and tool calls read back from its text."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from batchinfer.errors import BadParameters
from batchinfer.server.errors import bad_request
from batchinfer.server.frontend import ServedModel
from batchinfer.server.schemas import ChatRequest
from batchinfer.text.tool_choice import tool_choice_schema
from batchinfer.text.tools import ToolCallParser, ToolDelta, detect_format, keeps_special_tokens, parse_tool_calls

_ANY: dict[str, Any] = {"type": "object"}


class Said(NamedTuple):
    """Text beside the calls, and the calls as the wire has them."""

    content: str
    calls: list[dict[str, Any]]


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

    def read(self, text: str) -> Said:
        """What a finished answer says. Text that is no call stays text."""
        if self.mode == "auto":
            content, calls = parse_tool_calls(text, self.format) if self.format else (text, [])
            return self._said(content or "", [(call.name, call.arguments) for call in calls])
        if self.mode == "one":
            return self._said("", [(self.name, text)])
        try:
            calls_of = orjson.loads(text)
            return self._said("", [(call["name"], orjson.dumps(call["parameters"]).decode()) for call in calls_of])
        except (ValueError, KeyError, TypeError):  # cut off by max_tokens
            return Said(text, [])

    def _said(self, content: str, calls: list[tuple[str, str]]) -> Said:
        kept = calls[:1] if self.only_first else calls
        return Said(content, [_call(name, arguments) for name, arguments in kept])


class ToolStream:
    """The same for an answer that is being written: deltas as the wire has them."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
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
        return deltas + [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(said.calls)]

    def _delta(self, piece: ToolDelta) -> dict[str, Any]:
        if piece.index is None:
            return {"content": piece.content}
        self.called = True
        if piece.name is None:
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
        return {"tool_calls": [{"index": piece.index, **_call(piece.name, piece.arguments)}]}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def tool_use(model: ServedModel, body: ChatRequest) -> ToolUse | None:
    """None without tools, or where tool_choice is none. Raises ApiError."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        return None
    only_first = body.parallel_tool_calls is False
    dialect = detect_format(model.chat_template or "")
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolUse("auto", dialect, only_first=only_first)
    if dialect is not None:
        try:
            forced = tool_choice_schema(body.tools, choice, dialect)
        except BadParameters as error:
            raise bad_request(str(error), "tool_choice") from None
        return ToolUse("auto", dialect, constraint=forced, only_first=only_first)
    return _forced_json(body.tools, choice, only_first)


def _forced_json(tools: list[dict[str, Any]], choice: Any, only_first: bool) -> ToolUse:
    """For a model whose own way of calling is not known."""
    schemas = {_name(tool): (tool["function"].get("parameters") or _ANY) for tool in tools}
    if choice == "required":
        return ToolUse("many", constraint={"json": _calls_schema(schemas, only_first)})
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    if not isinstance(name, str) or name not in schemas:
        known = ", ".join(schemas)
        raise bad_request(f"tool_choice must be none, auto, required or one of the tools: {known}", "tool_choice")
    return ToolUse("one", name=name, constraint={"json": schemas[name]})


def _name(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request("every tool must have a function with a name", "tools")
    return str(function["name"])


def _calls_schema(schemas: dict[str, Any], only_one: bool) -> dict[str, Any]:
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": schema},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    bounds = {"minItems": 1, "maxItems": 1} if only_one else {"minItems": 1}
    return {"type": "array", "items": {"anyOf": options}, **bounds}
