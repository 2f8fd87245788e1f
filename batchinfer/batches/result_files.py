"""The end of a batch: the committed parts of its job become an output file and an error file, in input order."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from batchinfer.batches.catalog import Catalog
from batchinfer.errors import StorageError

_GOOD = b'"error":null}\n'  # how the line of an answered request ends, see batchlines
# kind of a request that never ran → code and message of its line
_NOT_RUN = {
    "cancelled": ("batch_cancelled", "This batch was cancelled before this request was executed."),
    "deadline": ("batch_expired", "The completion window ended before this request was executed."),
}
_CODES = {"too_long": "context_length_exceeded", "engine": "engine_failure"}


class Results(NamedTuple):
    """Ids of the two files; None for one that would be empty."""

    output_file_id: str | None
    error_file_id: str | None


def store_results(catalog: Catalog, batch_id: str, parts: Sequence[str]) -> Results:
    """Split the parts of the job's output into the two files. Idempotent: done twice it makes the same files again."""
    with _Target(catalog, batch_id, "output") as output, _Target(catalog, batch_id, "error") as errors:
        for line in _lines(catalog.work(batch_id), parts):
            if line.endswith(_GOOD):
                output.write(line)
            else:
                errors.write(_error_line(line))
        return Results(output.store(), errors.store())


def _lines(work: Path, parts: Sequence[str]) -> Iterator[bytes]:
    for name in parts:
        try:
            with (work / name).open("rb") as lines:
                yield from lines
        except FileNotFoundError:
            raise StorageError(f"{work / name}: was committed and is gone; restore it") from None


def _error_line(line: bytes) -> bytes:
    """Return the line of the error file: a failed request has a response, one that never ran only an error."""
    values = orjson.loads(line)
    kind = values["error"]["code"]
    if kind in _NOT_RUN:
        code, message = _NOT_RUN[kind]
        values |= {"response": None, "error": {"code": code, "message": message}}
    else:
        response = values["response"]
        problem = response["body"]["error"]
        problem["type"] = "invalid_request_error" if response["status_code"] < 500 else "server_error"
        problem["code"] = _CODES.get(kind, kind)
        response["body"] = {"error": problem}
        values["error"] = None
    return orjson.dumps(values) + b"\n"


class _Target:
    """One of the two files while it is written; removed unless `store` was reached."""

    def __init__(self, catalog: Catalog, batch_id: str, what: str) -> None:
        self._catalog = catalog
        self._name = f"{batch_id}_{what}.jsonl"
        self._id = "file-" + hashlib.sha256(self._name.encode()).hexdigest()[:32]
        self._path = catalog.temporary()
        self._file: BinaryIO = self._path.open("wb")
        self.write = self._file.write

    def store(self) -> str | None:
        self._file.close()
        if self._path.stat().st_size == 0:
            return None
        return self._catalog.add_file(self._path, self._name, "batch_output", self._id).id

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self._path.unlink(missing_ok=True)
