"""Lines of OpenAI's batch format: https://platform.openai.com/docs/api-reference/batch/request-input."""

from __future__ import annotations

from typing import Any

from batchinfer.errors import InvalidInput
from batchinfer.io.inputs import InputLine

COLUMNS = ("custom_id", "method", "url", "body")


def has_id(row: dict[str, Any]) -> bool:
    """An id is a text, and not an empty one."""
    identity = row.get("custom_id")
    return isinstance(identity, str) and identity != ""


def check(row: dict[str, Any], line: InputLine, first: int | None = None) -> None:
    """`first`: the ordinal of the line that has the same id, if it is another one. Raises InvalidInput."""
    if not has_id(row):
        raise InvalidInput("custom_id is empty" if row.get("custom_id") == "" else "custom_id must be a string")
    if first is not None:
        where = f"on line {first}" if line.element is None else f"by element [{first}]"
        raise InvalidInput(f"custom_id {row['custom_id']!r} was used {where} already")
    for name in ("method", "url"):
        if not isinstance(row.get(name), str | None):
            raise InvalidInput(f"{name} must be a string")
    if not isinstance(row.get("body"), dict):
        raise InvalidInput("body must be a JSON object")
