"""Cells that are the text of a JSON value: how values that no column type holds are carried.

NaN and Infinity, which Python writes into JSON and JSON lacks, stand in such a text as they are until it is written.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import InvalidInput
from batchinfer.io.cells import cells_of
from batchinfer.values.plain import finite_json

# orjson reads an integer beyond 64 bits as a double, and writes a double of that size with such an exponent
_HUGE = re.compile(rb"e\+?(?:1[89]|[2-9][0-9]|[1-3][0-9][0-9])(?![0-9])")


def parse_lenient(raw: bytes) -> Any:
    """What a line means that orjson refuses: NaN, Infinity, integers of hundreds of digits. Raises ValueError."""
    try:
        value = json.loads(raw.decode())
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def exact(raw: bytes | None, name: str, value: Any) -> Any:
    """A line's value by Python's own parser, which keeps integers of any size; `value` where it gives up."""
    try:
        return value if raw is None else json.loads(raw)[name]
    except (ValueError, RecursionError):  # thousands of digits, or nested too deep for it
        return value


def to_text(value: Any, name: str, raw: bytes) -> str:
    """The text of a line's value. Raises InvalidInput for one that is nested too deep."""
    try:
        text = orjson.dumps(value)
        if _HUGE.search(text):
            value = exact(raw, name, value)
        elif b"null" not in text or _is_finite(value):
            return text.decode()
    except TypeError:
        pass  # an integer of hundreds of digits, or nested deeper than orjson writes
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidInput(f"column {name!r} is nested too deep") from None


def _is_finite(value: Any) -> bool:
    """Whether no number of it is NaN or infinity, as 1e400 is."""
    parts = [value]
    for part in parts:
        if isinstance(part, float) and not math.isfinite(part):
            return False
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return True


def number_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Fractions as JSON text, which is how lines give numbers of both kinds."""
    texts = [None if value is None else json.dumps(value) for value in cells_of(column)]
    return pa.chunked_array([texts], pa.string())


def finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """JSON text with null for NaN and Infinity, which no other reader of it takes."""
    if not pc.any(pc.match_substring_regex(column, "NaN|Infinity")).as_py():
        return column
    texts = [text and finite_json(text) for text in column.to_pylist()]
    return pa.chunked_array([texts], pa.string())
