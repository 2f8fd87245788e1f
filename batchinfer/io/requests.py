"""Lines of OpenAI's batch format: https://platform.openai.com/docs/api-reference/batch/request-input."""

from __future__ import annotations

from typing import Any

from batchinfer.errors import InvalidInput
from batchinfer.io.inputs import InputLine

COLUMNS = ("custom_id", "method", "url", "body")


def has_id(row: dict[str, Any]) -> bool:
    """Return True if the row's custom_id is a non-empty string."""
    identity = row.get("custom_id")
    return isinstance(identity, str) and identity != ""


def check_request(row: dict[str, Any], line: InputLine, first: int | None = None) -> None:
    """Validate a request line. `first`: the ordinal of an earlier line with the same id. Raises InvalidInput."""
    if not has_id(row):
        raise InvalidInput("custom_id is empty" if row.get("custom_id") == "" else "custom_id must be a string")
    if first is not None:
        where = f"on line {first}" if line.element is None else f"by element [{first}]"
        raise InvalidInput(f"custom_id {row['custom_id']!r} is already used {where}")
    for name in ("method", "url"):
        if not isinstance(row.get(name), str | None):
            raise InvalidInput(f"{name} must be a string")
    if not isinstance(row.get("body"), dict):
        raise InvalidInput("body must be a JSON object")
