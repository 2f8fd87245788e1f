"""Tools of one chat: what tool_choice forces the answer to be, and tool calls read back from its text."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import orjson

from batchinfer.server.errors import bad_request
from batchinfer.server.frontend import ServedModel
from batchinfer.server.schemas import ChatRequest

_FORMATS = "batchinfer.text.tools"
# without it a model's calls are text like any other
formats: Any = import_module(_FORMATS) if find_spec(_FORMATS) else None

_ANY: dict[str, Any] = {"type": "object"}


class Said(NamedTuple):
    """Text beside the calls, and the calls as the wire has them."""

    content: str
    calls: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How to read an answer. auto: calls in the model's own format; one, many: the whole text is JSON that was forced.

    `constraint` is what structured_outputs must be for that.
    """

    mode: Literal["auto", "one", "many"]
    format: str | None = None
    name: str = ""
    constraint: dict[str, Any] | None = None
    only_first: bool = False

    def read(self, text: str) -> Said:
        """What a finished answer says. Text that is no call stays text."""
        if self.mode == "auto":
            content, calls = formats.parse_tool_calls(text, self.format) if self.format else (text, [])
            return self._said(content or "", [(call.name, call.arguments) for call in calls])
        if self.mode == "one":
            return self._said("", [(self.name, text)])
        try:
            return self._said(
                "", [(call["name"], orjson.dumps(call["parameters"]).decode()) for call in orjson.loads(text)]
            )
        except (ValueError, KeyError, TypeError):  # cut off by max_tokens
            return Said(text, [])

    def _said(self, content: str, calls: list[tuple[str, str]]) -> Said:
        kept = calls[:1] if self.only_first else calls
        return Said(content, [_call(name, arguments) for name, arguments in kept])


def detect(chat_template: str | None) -> str | None:
    """The format of tool calls that a chat template asks for, if it is a known one."""
    return formats.detect_format(chat_template or "") if formats is not None else None


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
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolUse("auto", detect(model.chat_template), only_first=only_first)
    schemas = {_name(tool): (tool["function"].get("parameters") or _ANY) for tool in body.tools}
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
