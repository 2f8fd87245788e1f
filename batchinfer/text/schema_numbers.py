"""Numbers of a JSON schema that the grammar library cannot hold: it reads bounds and constants as float64.

9007199254740993 (2**53 + 1) would silently become 9007199254740992, and an answer the wrong number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_WHOLE = 1 << 53  # up to here every integer is a float64, and so is the next one
_SIGNED = 1 << 63
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_EMBEDDED = "%json"  # a schema in a grammar


def write_whole(schema: Any) -> None:
    """Write 9007199254740991.0 as 9007199254740991, in place: the library reads the first one wrong, by one."""
    for part in _within(schema):
        places = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for place, value in list(places):
            if type(value) is float and value.is_integer():
                part[place] = int(value)


def inexact_number(schema: Any) -> str:
    """The first number of a schema that would be another one, with its key; empty if there is none."""
    keys = (entry for part in _within(schema) if isinstance(part, dict) for entry in part.items())
    numbers = ((key, number) for key, value in keys for number in _numbers(key, value))
    return next((f"{key} {number}" for key, number in numbers if not _exact(key, int(number))), "")


def inexact_number_of_grammar(grammar: str) -> str:
    """The same for the schemas within a grammar. What is no JSON is left to the library."""
    decoder = json.JSONDecoder()
    for text in grammar.split(_EMBEDDED)[1:]:
        try:
            schema, _ = decoder.raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            continue
        found = inexact_number(schema) or _long_float(schema)
        if found:
            return found
    return ""


def _numbers(key: str, value: Any) -> Iterator[Any]:
    """The integers of one key; a bound may be written as 1e20. A constant that is a float is held as one."""
    if key in ("const", "enum"):
        yield from (one for one in _within(value) if type(one) is int)
    elif key in _BOUNDS and (type(value) is int or (type(value) is float and value.is_integer())):
        yield value


def _exact(key: str, number: int) -> bool:
    if key.startswith("exclusive") or key == "multipleOf":
        return abs(number) < _WHOLE
    if key == "maximum" and number == _SIGNED - 1:  # the library's own largest
        return True
    return abs(number) < _SIGNED and int(float(number)) == number


def _long_float(schema: Any) -> str:
    """The first whole number whose text as a float has more digits than the library reads exactly, with its key."""
    entries = (entry for part in _within(schema) if isinstance(part, dict) for entry in part.items())
    floats = ((key, one) for key, value in entries for one in _within(value) if type(one) is float)
    return next((f"{key} {one}" for key, one in floats if one.is_integer() and abs(one) * 10 > _WHOLE), "")


def _within(value: Any) -> Iterator[Any]:
    """A JSON value, and all that it holds."""
    left = [value]
    while left:
        one = left.pop()
        yield one
        if isinstance(one, list | dict):
            left += one.values() if isinstance(one, dict) else one
