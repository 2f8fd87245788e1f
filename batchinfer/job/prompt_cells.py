"""Cells that hold a prompt, or a part of one: chat messages, ready prompts, JSON text."""

from __future__ import annotations

from typing import Any

from batchinfer.errors import InvalidInput
from batchinfer.text.messages import normalize_messages
from batchinfer.values.cell import require_representable
from batchinfer.values.plain import parse_exact_json, to_json_value


def parse_json(text: str, what: str) -> Any:
    """Parse JSON of a cell. Raises InvalidInput."""
    try:
        return parse_exact_json(text)
    except ValueError as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from None


def chat_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Return the normalised messages of a cell: a list of mappings, or its JSON text.

    Raises InvalidInput that names the message.
    """
    value = parse_json(value, what) if isinstance(value, str) else to_json_value(value, what, exact=True)
    if value is None:
        raise InvalidInput(f"{what} is null")
    return normalize_messages(value, f"{what}: ")


def ready_prompt(value: Any, what: str) -> str | list[int]:
    """Return a ready prompt: text, or token ids. Raises InvalidInput."""
    require_representable(value, what)
    if value is None:
        raise InvalidInput(f"{what} is null")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        if not value:
            raise InvalidInput(f"{what}: the prompt is empty")
        return value
    raise InvalidInput(f"{what} must be text or a list of token ids, got {type(value).__name__}")
