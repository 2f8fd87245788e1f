"""Cells as JSON values, for messages and overrides, and as text, for prompts."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import secrets
from decimal import Decimal
from typing import Any

import orjson

from batchinfer.errors import InvalidInput
from batchinfer.values.cell import Unrepresentable, require_representable
from batchinfer.values.number import Number, plain_number

_TIMES = datetime.date | datetime.time | datetime.timedelta
_MARK = secrets.token_hex(16)  # prefix of the placeholder of a decimal number until the JSON is written
_DIGITS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else ord(" ") for byte in range(256))
_LONG = b"0" * 19
_STRING_OR_CONSTANT = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|-?(?:NaN|Infinity)', re.DOTALL)
_MARKED = re.compile(f'"{_MARK}([^"]*)"')


def to_json_value(value: Any, what: str, exact: bool = False) -> Any:
    """Convert a value to JSON's types: times become text, decimal numbers become numbers.

    exact: keep a decimal number that no double equals, for `json_text`. Raises InvalidInput, prefixed with `what`, if a
    part of the value is Unrepresentable.
    """
    if isinstance(value, dict):
        return {display_text(key): to_json_value(item, what, exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item, what, exact) for item in value]
    if isinstance(value, Decimal):
        number = plain_number(value)
        return value if exact and value != number else number
    return str(value) if isinstance(value, _TIMES) else require_representable(value, what)


def parse_exact_json(text: str) -> Any:
    """Parse JSON text with all digits of integers, and with NaN and Infinity. Raises ValueError."""
    with contextlib.suppress(orjson.JSONDecodeError):
        value = orjson.loads(text)
        # orjson reads integers beyond 64 bits as doubles
        if _LONG not in text.encode().translate(_DIGITS):
            return value
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def replace_nonfinite_text(text: str) -> str:
    """Replace NaN and Infinity in JSON text by null: Python writes them, and no other parser accepts them."""
    return _STRING_OR_CONSTANT.sub(lambda match: match[1] or "null", text)


def json_text(value: Any, nulls: tuple[type, ...] = (), **layout: Any) -> str:
    """Return JSON text with all digits of decimal numbers.

    `nulls`: types whose values become null. `layout`: arguments of json.dumps. Raises InvalidInput for NaN, infinity
    and Unrepresentable cells, TypeError for values of other types.
    """
    numbers = False

    def other(item: Any) -> Any:
        nonlocal numbers
        if isinstance(item, Decimal):
            numbers = True
            return f"{_MARK}{Number(item)}"
        if isinstance(item, _TIMES):
            return str(item)
        if isinstance(item, nulls):
            return None
        if type(item) is Unrepresentable:
            item.refuse()
        raise TypeError(f"a value of type {type(item).__name__} cannot be written as JSON")

    try:
        text = json.dumps(value, allow_nan=False, default=other, **layout)
    except ValueError as error:
        if "JSON compliant" in str(error):
            raise InvalidInput("JSON has no NaN and no infinity") from None
        raise
    return _MARKED.sub(r"\1", text) if numbers else text


def display_text(value: Any) -> str:
    """Return a cell as text for display or as a JSON key: text and times unquoted, everything else as JSON."""
    if isinstance(value, str | Decimal | Unrepresentable | _TIMES):
        return _to_text(value)
    return json.dumps(value, default=_to_text, ensure_ascii=False, separators=(",", ":"))


def _to_text(value: Any) -> str:
    return (value.text or "") if type(value) is Unrepresentable else str(value)
