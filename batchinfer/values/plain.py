"""Cells as JSON has them: for messages and overrides, and as text for prompts."""

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
from batchinfer.values.cell import Unheld, held
from batchinfer.values.number import Number, plain_number

_TIMES = datetime.date | datetime.time | datetime.timedelta
_MARK = secrets.token_hex(16)  # begins the text that stands for a decimal number until the JSON is made
_DIGITS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else ord(" ") for byte in range(256))
_LONG = b"0" * 19
_STRING_OR_CONSTANT = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|-?(?:NaN|Infinity)', re.DOTALL)
_MARKED = re.compile(f'"{_MARK}([^"]*)"')


def plain(value: Any, what: str, exact: bool = False) -> Any:
    """The value in JSON's types: times as text, decimal numbers as numbers.

    exact: a decimal number that is no double stays one, for `json_text`. Raises InvalidInput that begins with `what`
    where a part of it is Unheld.
    """
    if isinstance(value, dict):
        return {shown_text(key): plain(item, what, exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what, exact) for item in value]
    if isinstance(value, Decimal):
        number = plain_number(value)
        return value if exact and value != number else number
    return str(value) if isinstance(value, _TIMES) else held(value, what)


def from_json(text: str) -> Any:
    """The value of a JSON text, with all digits of integers, and NaN and Infinity. Raises ValueError."""
    with contextlib.suppress(orjson.JSONDecodeError):
        value = orjson.loads(text)
        # it makes doubles of integers beyond 64 bits
        if _LONG not in text.encode().translate(_DIGITS):
            return value
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def finite_json(text: str) -> str:
    """JSON with null for NaN and Infinity, which Python writes and no other reader takes."""
    return _STRING_OR_CONSTANT.sub(lambda match: match[1] or "null", text)


def json_text(value: Any, nulls: tuple[type, ...] = (), **layout: Any) -> str:
    """JSON with all digits of decimal numbers. `nulls`: types whose values are null; `layout` is that of json.dumps.

    Raises InvalidInput for NaN, infinity and cells that cannot be held, TypeError for what is no value.
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
        if type(item) is Unheld:
            item.refuse()
        raise TypeError(f"a value of type {type(item).__name__} cannot be written as JSON")

    try:
        text = json.dumps(value, allow_nan=False, default=other, **layout)
    except ValueError as error:
        if "JSON compliant" in str(error):
            raise InvalidInput("JSON has no NaN and no infinity") from None
        raise
    return _MARKED.sub(r"\1", text) if numbers else text


def shown_text(value: Any) -> str:
    """Of any cell, for people's eyes and as a key of JSON: text and times as they are, everything else as JSON."""
    if isinstance(value, str | Decimal | Unheld | _TIMES):
        return _shown(value)
    return json.dumps(value, default=_shown, ensure_ascii=False, separators=(",", ":"))


def _shown(value: Any) -> str:
    return (value.text or "") if type(value) is Unheld else str(value)
