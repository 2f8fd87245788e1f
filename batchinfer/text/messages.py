"""Chat messages as chat templates take them, from what clients of OpenAI's API send."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from batchinfer.errors import InvalidInput

_PROBE = "probe-of-the-template"
_WRITTEN_OUT = re.compile(r"""['"]type['"]""")  # a list of parts that was printed as it is


class ContentForms(NamedTuple):
    """What a template can do with a message's content: text, and a list of parts."""

    text: bool
    parts: bool


def content_forms(render: Callable[[list[dict[str, Any]]], str]) -> ContentForms:
    """Found by trying. `render` raises where the template fails; one that fails at everything is taken to want text."""

    def shows(content: Any) -> bool:
        try:
            text = render([{"role": "user", "content": content}])
        except Exception:  # whatever a template does
            return False
        return _PROBE in text and _WRITTEN_OUT.search(text) is None

    parts = shows([{"type": "text", "text": _PROBE}])
    return ContentForms(shows(_PROBE) or not parts, parts)


def shape_messages(messages: Any, forms: ContentForms) -> list[dict[str, Any]]:
    """Messages for one template: content in a form that it takes, absent keys left out, a call's arguments as mapping.

    messages: a list of mappings with a role. Raises InvalidInput for others, and for parts that are lost as text.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidInput(f"messages must be a non-empty list, got {_short(messages)}")
    return [_shape(message, f"messages[{number}]", forms) for number, message in enumerate(messages)]


def _shape(message: Any, place: str, forms: ContentForms) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidInput(f"{place} must be an object with role and content, got {_short(message)}")
    if not isinstance(message.get("role"), str):
        raise InvalidInput(f"{place} has no role, or one that is not text: {_short(message)}")
    shaped = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list) and not forms.parts:
        shaped["content"] = "".join(text_of(part, place) for part in content)
    elif isinstance(content, str) and not forms.text:
        shaped["content"] = [{"type": "text", "text": content}]
    elif content is None and "content" in message:
        shaped["content"] = "" if shaped.get("tool_calls") else None
    if isinstance(shaped.get("tool_calls"), list):
        shaped["tool_calls"] = [_call(call) for call in shaped["tool_calls"]]
    return shaped


def text_of(part: Any, place: str) -> str:
    """The text of a content part. Raises InvalidInput for any other part; `place` says where it stands."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidInput(f"{place}: content part of type {kind!r}; only text is supported")


def _call(call: Any) -> Any:
    """Arguments come as JSON text, and templates write them as JSON: text would be quoted once more."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
