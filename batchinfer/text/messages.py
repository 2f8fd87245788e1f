"""Chat messages: normalised once, from the form that clients and rows send, then adapted to a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from batchinfer.errors import InvalidInput, TemplateError, format_value

_PROBE = "probe-of-the-template"
_WRITTEN_OUT = re.compile(r"""['"]type['"]""")  # a list of parts, printed by its repr


class ContentForms(NamedTuple):
    """Forms of a message's content that a template can show: a text, and a list of parts."""

    text: bool
    parts: bool


def content_forms(render: Callable[[list[dict[str, Any]]], str]) -> ContentForms:
    """Return the forms that a template shows, found by rendering a probe.

    `render` raises if the template fails. A template that fails with both forms is taken to accept text.
    """

    def shows(content: Any) -> bool:
        try:
            text = render([{"role": "user", "content": content}])
        except Exception:  # a template may raise anything
            return False
        return _PROBE in text and _WRITTEN_OUT.search(text) is None

    parts = shows([{"type": "text", "text": _PROBE}])
    return ContentForms(shows(_PROBE) or not parts, parts)


class ChatMessages(list[dict[str, Any]]):
    """Normalised messages: each has a role, no key is null, content is text or a list of text parts.

    A message without content has an empty text, or no `content` if it has tool calls.
    """


def normalize_messages(messages: Any, place: str = "") -> ChatMessages:
    """Validate messages and return them normalised; return `ChatMessages` as they are. Raises InvalidInput.

    messages: a list of mappings with a role; content is text, a list of text parts, or null. place: prefix of a
    message's name in errors, e.g. "column 'm': ".
    """
    if isinstance(messages, ChatMessages):
        return messages
    if not isinstance(messages, list) or not messages:
        raise InvalidInput(f"{place}messages must be a non-empty list, got {_short(messages)}", param="messages")
    return ChatMessages(_normalize(message, f"{place}messages[{number}]") for number, message in enumerate(messages))


def shape_messages(messages: Any, forms: ContentForms) -> list[dict[str, Any]]:
    """Return messages for one template: content in a form that it shows, arguments of tool calls as mappings.

    Text parts are joined by line breaks if the template shows text only, as vLLM does. Raises InvalidInput.
    """
    return [_shape(message, forms) for message in normalize_messages(messages)]


def opened(messages: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    """Return messages with `mark` and a space appended to the last one's text, for `cut_open`. Raises InvalidInput."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content}{mark} "}]
    if not content:
        raise InvalidInput("continue_final_message: the last message has no text to continue", param="messages")
    *parts, part = content
    return [*before, {**last, "content": [*parts, {**part, "text": f"{part['text']}{mark} "}]}]


def cut_open(text: str, last: Mapping[str, Any], mark: str) -> str:
    """Return the prompt cut at the mark that `opened` put at the end of its last message, as transformers cuts it.

    Spaces at the end of the message stay if the template keeps them. Raises TemplateError if the prompt lacks the
    message.
    """
    content = last["content"]
    said = (content if isinstance(content, str) else content[-1]["text"]).strip()
    if said not in text:
        raise TemplateError("continue_final_message: the chat template changes the last message's text")
    end = text.rindex(mark)
    return text[:end] if text[end + 1 : end + 2] == " " else text[:end].rstrip()


def _normalize(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{place} must be an object with role and content, got {_short(message)}", param="messages")
    if not isinstance(message.get("role"), str):
        raise InvalidInput(f"{place} has no role, or its role is not text: {_short(message)}", param="messages")
    normalized = {name: value for name, value in message.items() if value is not None}
    calls = "tool_calls" in normalized or "function_call" in normalized
    if "content" in message or not calls:
        normalized["content"] = _content(message.get("content"), place, "content" in message)
    return normalized


def _content(content: Any, place: str, given: bool) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return [{"type": "text", "text": _text(part, place)} for part in content]
    if (content is None and given) or content == []:
        return ""
    what = "has no content" if content is None else f"content must be text or a list of parts, got {_short(content)}"
    raise InvalidInput(f"{place}{' ' if content is None else ': '}{what}", param="messages")


def _text(part: Any, place: str) -> str:
    """Return the text of a content part. Raises InvalidInput for any other part."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidInput(f"{place}: content part of type {format_value(kind)}; only text is supported", param="messages")


def _shape(message: dict[str, Any], forms: ContentForms) -> dict[str, Any]:
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list) and not forms.parts:
        message["content"] = "\n".join(part["text"] for part in content)
    elif isinstance(content, str) and not forms.text:
        message["content"] = [{"type": "text", "text": content}] if content else []
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return message


def _call(call: Any) -> Any:
    """Return a tool call with parsed arguments: templates write them as JSON, which would quote a JSON text again."""
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
