"""Grammars for `tool_choice`: force a tool call in the format on which the model was trained (see `tools`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.errors import BadParameters


def tool_choice_schema(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, dialect: str | None, parallel: bool = True
) -> dict[str, Any] | None:
    """Return the `structured_outputs` that force the calls of `tool_choice`, in the model's format.

    tools: as in OpenAI's chat requests. tool_choice: "required", or {"type": "function", "function": {"name": …}}; None
    for "none" and "auto", which force nothing. parallel false: at most one call. The arguments follow each tool's own
    schema. dialect None: the model's format is unknown; the output is then a JSON list of {"name", "parameters"}, or
    for a named tool its arguments alone. Raises BadParameters.
    """
    if tool_choice in (None, "none", "auto"):
        return None
    schemas = dict(_declared(tool) for tool in tools)
    if tool_choice != "required":
        named = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
        name = named.get("name") if isinstance(named, Mapping) else None
        if name not in schemas:
            known = ", ".join(schemas) or "none"
            raise BadParameters(f"tool_choice must be none, auto, required or name a tool; given tools: {known}")
        schemas = {name: schemas[name]}
        if dialect is None:
            return {"json": schemas[name]}
    if not schemas:
        raise BadParameters("tool_choice requires a call, but there are no tools")
    return {"grammar": _call_grammar(schemas, dialect, several=parallel and tool_choice == "required")}


def _declared(tool: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadParameters("every tool must have a function with a name")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise BadParameters(f"the parameters of tool {function['name']!r} must be a JSON schema, a mapping")
    return function["name"], {"type": "object", **parameters}


def _call_grammar(schemas: Mapping[str, dict[str, Any]], dialect: str | None, several: bool) -> str:
    """Return a grammar in llguidance's dialect. Each schema is separate, so that its references stay valid.

    The layout is json.dumps', as templates show it.
    """
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    key = "parameters" if dialect in ("llama3", None) else "arguments"
    lines = ["start: " + _RUNS[dialect][several], "call: " + " | ".join(f"call_{i}" for i in range(len(schemas)))]
    for number, (name, schema) in enumerate(schemas.items()):
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        lines.append(f'call_{number}: {json.dumps(head, ensure_ascii=False)} arguments_{number} "}}"')
        lines.append(f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': layout}, ensure_ascii=False)}")
    return "\n".join(lines)


_TAGGED = r'"<tool_call>\n" call "\n</tool_call>"'
_LIST = ('"[" call "]"', '"[" call (", " call)* "]"')
_RUNS: dict[str | None, tuple[str, str]] = {
    "hermes": (_TAGGED, rf'{_TAGGED} ("\n" {_TAGGED})*'),
    "llama3": ("call", "call"),
    "mistral": _LIST,  # without its mark, a token known only to its tokenizer; the parser accepts calls without it
    None: _LIST,
}
