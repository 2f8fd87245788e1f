"""JSON files of a model's directory, as downloads leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchinfer.errors import ModelError
from batchinfer.models.file_kind import said


def read_json(path: Path) -> Any:
    """Return the parsed file. Raises ModelError if it cannot be read, FileNotFoundError if it does not exist.

    Half a surrogate pair in a text is damage: neither a tokenizer nor a template could be given it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ModelError(f"{path} is not a file of a model: it is nested too deeply") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ModelError(f"{path} {said(path, f'is not JSON: {error}')}") from None
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file is not there. Raises ModelError."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return values


def end_ids(values: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids of `eos_token_id`: a number or a list of them; other values are left out."""
    given = values.get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return frozenset(token for token in listed if type(token) is int and token >= 0)
