"""Detection of JSON schema numbers that the grammar library cannot represent.

The library stores bounds and constants as float64: 9007199254740993 (2**53 + 1) would silently become 9007199254740992,
and the output the wrong number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_EXACT_INTEGERS = 1 << 53  # every integer up to here is exact in float64
_SIGNED = 1 << 63
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_EMBEDDED = "%json"  # a schema in a grammar


def write_integers(schema: Any) -> None:
    """Replace 9007199254740991.0 by 9007199254740991, in place: the library's parser is off by one for the former."""
    for part in _within(schema):
        places = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for place, value in list(places):
            if type(value) is float and value.is_integer():
                part[place] = int(value)


def inexact_number(schema: Any) -> str:
    """Return the first number of a schema that would change, with its key; empty if there is none."""
    keys = (entry for part in _within(schema) if isinstance(part, dict) for entry in part.items())
    numbers = ((key, number) for key, value in keys for number in _numbers(key, value))
    return next((f"{key} {number}" for key, number in numbers if not _exact(key, int(number))), "")


def inexact_number_of_grammar(grammar: str) -> str:
    """Return the first such number of the schemas within a grammar. Invalid JSON is left to the library."""
    decoder = json.JSONDecoder()
    for text in grammar.split(_EMBEDDED)[1:]:
        try:
            schema, _ = decoder.raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            continue
        number = inexact_number(schema) or _long_float(schema)
        if number:
            return number
    return ""


def _numbers(key: str, value: Any) -> Iterator[Any]:
    """Yield the integers of one key; a bound may be written as 1e20. Float constants are exact."""
    if key in ("const", "enum"):
        yield from (one for one in _within(value) if type(one) is int)
    elif key in _BOUNDS and (type(value) is int or (type(value) is float and value.is_integer())):
        yield value


def _exact(key: str, number: int) -> bool:
    if key.startswith("exclusive") or key == "multipleOf":
        return abs(number) < _EXACT_INTEGERS
    if key == "maximum" and number == _SIGNED - 1:  # the library's maximum
        return True
    return abs(number) < _SIGNED and int(float(number)) == number


def _long_float(schema: Any) -> str:
    """Return the first integral float whose text has more digits than the library parses exactly, with its key."""
    entries = (entry for part in _within(schema) if isinstance(part, dict) for entry in part.items())
    floats = ((key, one) for key, value in entries for one in _within(value) if type(one) is float)
    return next((f"{key} {one}" for key, one in floats if one.is_integer() and abs(one) * 10 > _EXACT_INTEGERS), "")


def _within(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all its nested parts."""
    left = [value]
    while left:
        one = left.pop()
        yield one
        if isinstance(one, list | dict):
            left += one.values() if isinstance(one, dict) else one
