"""Cells that hold the text of a JSON value: the representation of values that no column type can hold.

NaN and Infinity, which Python writes although JSON lacks them, stay in the text until it is written.
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
from batchinfer.values.plain import replace_nonfinite_text

# orjson reads integers beyond 64 bits as doubles and writes doubles of that size with these exponents
_HUGE = re.compile(rb"e\+?(?:1[89]|[2-9][0-9]|[1-3][0-9][0-9])(?![0-9])")


def parse_lenient(raw: bytes) -> Any:
    """Parse a line that orjson refuses: NaN, Infinity, integers of hundreds of digits. Raises ValueError."""
    try:
        value = json.loads(raw.decode())
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def parse_exact(raw: bytes | None, name: str, value: Any) -> Any:
    """Return a line's value by Python's parser, which keeps integers of any size; `value` if that parser fails."""
    try:
        return value if raw is None else json.loads(raw)[name]
    except (ValueError, RecursionError):  # thousands of digits, or nested too deep for Python
        return value


def to_text(value: Any, name: str, raw: bytes) -> str:
    """Return the JSON text of a line's value. Raises InvalidInput if it is nested too deep."""
    try:
        text = orjson.dumps(value)
        if _HUGE.search(text):
            value = parse_exact(raw, name, value)
        elif b"null" not in text or _is_finite(value):
            return text.decode()
    except TypeError:
        pass  # an integer of hundreds of digits, or nested deeper than orjson supports
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidInput(f"column {name!r} is nested too deep") from None


def _is_finite(value: Any) -> bool:
    """Return True if no number in the value is NaN or infinity, as 1e400 is."""
    parts = [value]
    for part in parts:
        if isinstance(part, float) and not math.isfinite(part):
            return False
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return True


def number_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return floats as JSON text, the representation of integer and fractional numbers in one column of lines."""
    texts = [None if value is None else json.dumps(value) for value in cells_of(column)]
    return pa.chunked_array([texts], pa.string())


def replace_nonfinite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace NaN and Infinity in JSON text by null, because no other parser accepts them."""
    if not pc.any(pc.match_substring_regex(column, "NaN|Infinity")).as_py():
        return column
    texts = [text and replace_nonfinite_text(text) for text in column.to_pylist()]
    return pa.chunked_array([texts], pa.string())
