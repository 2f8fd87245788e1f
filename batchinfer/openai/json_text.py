"""JSON output for values that echo client input: any value that JSON can hold is written without an error."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson


def dump_json(value: Any) -> bytes:
    """Return JSON bytes: integers of any size, lone surrogates as their escape (text), NaN and infinities as null."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits or a lone surrogate
        return json.dumps(_writable(value), ensure_ascii=False, separators=(",", ":")).encode()


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
