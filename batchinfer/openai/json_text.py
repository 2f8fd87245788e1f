"""JSON of answers, which repeat what a client sent: whatever JSON can hold can be written."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson


def dump_json(value: Any) -> bytes:
    """JSON bytes. Lone surrogates are written as \\ud800 is, in text; integers of any size as they are; NaN is null."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(_writable(value), ensure_ascii=False, separators=(",", ":")).encode()


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
