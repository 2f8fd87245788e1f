"""What must be right about a batch's file before anything runs: https://platform.openai.com/docs/guides/batch.

Every line is a request of its own; the first faults are listed with their lines. What only the body decides (a sampling
value out of range, a prompt too long) is that request's error and no fault of the batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import InputError, InvalidInput
from batchinfer.io.catalog import Problem
from batchinfer.io.inputs import Line
from batchinfer.io.jsonl import parse
from batchinfer.io.lines import read_lines
from batchinfer.io.source import Sources
from batchinfer.spec import StorageSpec

MAX_PROBLEMS = 100
_PARTS = 64
_LOOK_ROWS = 1000
_ENTRY = struct.Struct("<16sQ")
_BUFFER_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Checked:
    """`problems`: the first of them, by line; a file without any is as good as it can be known without a model."""

    rows: int
    problems: tuple[Problem, ...]


def check_lines(
    path: Path, endpoint: str, models: Collection[str], scratch: Path, stopping: Callable[[], bool]
) -> Checked | None:
    """Read the whole file once, in bounded memory; `scratch` is a folder for this alone. None if `stopping`."""
    seen = _SeenIds(scratch)
    rows = 0
    problems: list[Problem] = []
    try:
        for line in _lines(path):
            rows += 1
            problems += _check(line, endpoint, models, seen)
            if len(problems) >= MAX_PROBLEMS:
                break
            if rows % _LOOK_ROWS == 0 and stopping():
                return None
        else:
            problems += seen.repeated(MAX_PROBLEMS)
    except InputError as error:  # UTF-16, or damaged compression
        problems.append(Problem("invalid_file", str(error).replace(str(path), "the input file")))
    finally:
        seen.close()
    if not rows and not problems:
        problems.append(Problem("empty_file", "The input file is empty: a batch needs at least one request."))
    return Checked(rows, tuple(sorted(problems, key=lambda problem: problem.line or 0)[:MAX_PROBLEMS]))


def _lines(path: Path) -> Iterator[Line]:
    with Sources(StorageSpec()).open(str(path)) as source:
        for lines in read_lines(source):
            yield from lines


def _check(line: Line, endpoint: str, models: Collection[str], seen: _SeenIds) -> Iterator[Problem]:
    try:
        row = parse(line.raw)
    except InvalidInput as error:
        yield Problem("invalid_json_line", f"This line is not a JSON object: {error}.", line.number)
        return
    custom_id = row.get("custom_id")
    if isinstance(custom_id, str) and custom_id:
        seen.add(custom_id, line.number)
    else:
        yield _missing("custom_id", custom_id, "a string", line)
    yield from _check_target(row, endpoint, line)
    body = row.get("body")
    if not isinstance(body, dict):
        yield _missing("body", body, "a JSON object", line)
        return
    model = body.get("model")
    if not isinstance(model, str):
        yield _missing("body.model", model, "a string", line)
    elif model not in models:
        known = ", ".join(sorted(models))
        message = f"The model {model!r} is not served here; this server has: {known}."
        yield Problem("model_not_found", message, line.number, "body.model")


def _check_target(row: dict[str, Any], endpoint: str, line: Line) -> Iterator[Problem]:
    method, url = row.get("method"), row.get("url")
    if not isinstance(method, str):
        yield _missing("method", method, "the string 'POST'", line)
    elif method != "POST":
        yield Problem("invalid_method", f"The method {method!r} is not supported: use 'POST'.", line.number, "method")
    if not isinstance(url, str):
        yield _missing("url", url, "a string", line)
    elif url != endpoint:
        message = f"The url {url!r} is not the endpoint of this batch, {endpoint!r}."
        yield Problem("invalid_url", message, line.number, "url")


def _missing(param: str, value: Any, wanted: str, line: Line) -> Problem:
    if value is None:
        return Problem("missing_required_parameter", f"{param} is missing: it must be {wanted}.", line.number, param)
    return Problem("invalid_type", f"{param} must be {wanted}.", line.number, param)


class _SeenIds:
    """Which custom_id stood where: 24 bytes each, on disk in parts by hash, of which one at a time is in memory."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch
        self._buffers = [bytearray() for _ in range(_PARTS)]

    def add(self, custom_id: str, line: int) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        buffer = self._buffers[digest[0] % _PARTS]
        buffer += _ENTRY.pack(digest, line)
        if len(buffer) >= _BUFFER_BYTES:
            self._flush(digest[0] % _PARTS)

    def repeated(self, most: int) -> list[Problem]:
        found: list[Problem] = []
        for part in range(_PARTS):
            self._flush(part)
            first: dict[bytes, int] = {}
            for digest, line in _ENTRY.iter_unpack(self._path(part).read_bytes()):
                before = first.setdefault(digest, line)
                if before != line and len(found) < most:
                    message = f"This custom_id was used on line {before} already."
                    found.append(Problem("duplicate_custom_id", message, line, "custom_id"))
        return found

    def close(self) -> None:
        for part in range(_PARTS):
            self._path(part).unlink(missing_ok=True)
        self._scratch.rmdir()

    def _flush(self, part: int) -> None:
        with self._path(part).open("ab") as file:
            file.write(self._buffers[part])
        self._buffers[part].clear()

    def _path(self, part: int) -> Path:
        return self._scratch / f"{part:02d}"
