"""Cells that hold a prompt, or a part of one: chat messages, ready prompts, JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from batchinfer.errors import InvalidInput
from batchinfer.text.messages import text_of


def parse_json(text: str, what: str) -> Any:
    """Raises InvalidInput."""
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from None


def chat_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content parts of type text joined, absent keys left out.

    `value` is a list of mappings, or its JSON text. Raises InvalidInput that names the message.
    """
    if isinstance(value, str):
        value = parse_json(value, what)
    if value is None:
        raise InvalidInput(f"{what} is null")
    if not isinstance(value, list) or not value:
        raise InvalidInput(f"{what} must be a non-empty list of messages")
    return [_message(message, f"{what}, message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{what}: must be a mapping with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise InvalidInput(f"{what}: has no role")
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = "".join(text_of(part, what) for part in content)
    elif content is None and (kept.get("tool_calls") or kept.get("function_call")):
        kept["content"] = None
    elif not isinstance(content, str):
        raise InvalidInput(f"{what}: content must be text, got {'null' if content is None else type(content).__name__}")
    return kept


def ready_prompt(value: Any, what: str) -> str | list[int]:
    """A prompt as it is: text, or token ids. Raises InvalidInput."""
    if value is None:
        raise InvalidInput(f"{what} is null")
    if isinstance(value, str):
        if not value.strip():
            raise InvalidInput(f"{what}: the prompt is empty")
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        if not value:
            raise InvalidInput(f"{what}: the prompt is empty")
        return value
    raise InvalidInput(f"{what} must be text or a list of token ids, got {type(value).__name__}")
