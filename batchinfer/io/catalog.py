"""Files and batches of OpenAI's batch API on local disk: what a server was given, and how far it is with it.

A record is one JSON file, written whole and then given its name; a content is a file beside it that never changes. All
records are in memory as well, so that a name from a request is looked up and never becomes a path.

    files/<id>.json  files/<id>.content     batches/<id>.json     work/<batch id>/ (the job's output folder)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import orjson

from batchinfer.errors import StorageError, UsageError
from batchinfer.io.filesystem import translate
from batchinfer.io.storage import LocalStore

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One stored file. `filename` is what the client called it, and never part of a path."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int  # Unix time, s


class Problem(NamedTuple):
    """Why a batch failed. `line` counts from 1; `param` is the field of the line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(NamedTuple):
    """Rows of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class BatchRecord:
    """One batch. `times`: status → when it began, Unix time in seconds; the first is validating."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    metadata: Mapping[str, str] | None
    status: Status = "validating"
    times: Mapping[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    problems: tuple[Problem, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def created_at(self) -> int:
        return self.times["validating"]

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> BatchRecord:
        problems = tuple(Problem(*problem) for problem in values.pop("problems"))
        return cls(**{**values, "counts": Counts(*values["counts"]), "problems": problems})


Record = TypeVar("Record", FileRecord, BatchRecord)


def new_id(prefix: str) -> str:
    """An id nobody can guess that sorts by the time it was made."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


class Catalog:
    """All files and batches below `root`, which one process has at a time. Thread-safe.

    Raises UsageError where another process has the directory, StorageError where it cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._store = LocalStore(str(self.root), self.root)
        self._lock = threading.RLock()
        with _explained(self.root):
            for folder in ("files", "batches", "work", ".tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._held = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise UsageError(f"{self.root}: another process serves the batches in it; use another directory") from None
        self._files = {record.id: record for record in (FileRecord(**values) for values in self._records("files"))}
        self._batches = {r.id: r for r in (BatchRecord.from_values(values) for values in self._records("batches"))}
        self._sweep()

    def close(self) -> None:
        """Let another process have the directory."""
        os.close(self._held)

    # -- files --------------------------------------------------------------------------------------------------

    def files(self) -> list[FileRecord]:
        """Newest first."""
        return self._listed(self._files)

    def file(self, file_id: str) -> FileRecord | None:
        return self._files.get(file_id)

    def content(self, file_id: str) -> Path:
        """Where the content of a file lies that the catalog has."""
        return self.root / "files" / f"{file_id}.content"

    def temporary(self) -> Path:
        """A path for a file that `add_file` is to take; the caller removes it if it does not come to that."""
        return self.root / ".tmp" / secrets.token_hex(16)

    def add_file(self, temporary: Path, filename: str, purpose: str, file_id: str | None = None) -> FileRecord:
        """Take a complete file over. With a `file_id` that is there, it takes that one's place."""
        with _explained(self.root), temporary.open("rb") as content:
            os.fsync(content.fileno())
            size = os.fstat(content.fileno()).st_size
        record = FileRecord(file_id or new_id("file-"), filename, purpose, size, int(time.time()))
        with self._lock:
            with _explained(self.root):
                temporary.replace(self.content(record.id))
            self._save("files", record)
            self._files[record.id] = record
        return record

    def delete_file(self, file_id: str) -> bool:
        """False if there is no such file. One that is being read stays readable to its reader."""
        with self._lock:
            if self._files.pop(file_id, None) is None:
                return False
            self._store.delete([f"files/{file_id}.json", f"files/{file_id}.content"])
            return True

    # -- batches ------------------------------------------------------------------------------------------------

    def batches(self) -> list[BatchRecord]:
        """Newest first."""
        return self._listed(self._batches)

    def batch(self, batch_id: str) -> BatchRecord | None:
        return self._batches.get(batch_id)

    def work(self, batch_id: str) -> Path:
        """The output folder of the batch's job."""
        return self.root / "work" / batch_id

    def add_batch(self, record: BatchRecord) -> BatchRecord:
        with self._lock:
            record = replace(record, times={"validating": int(time.time())})
            self._save("batches", record)
            self._batches[record.id] = record
        return record

    def move(self, batch_id: str, status: Status, *before: Status, **changes: Any) -> BatchRecord | None:
        """Give a batch its next status, if its present one is in `before`; None, and nothing done, if it is not."""
        with self._lock:
            record = self._batches[batch_id]
            if record.status not in before:
                return None
            times = {**record.times, status: int(time.time())}
            record = replace(record, status=status, times=times, **changes)
            self._save("batches", record)
            self._batches[batch_id] = record
        return record

    def count(self, batch_id: str, counts: Counts) -> None:
        """How far a batch is. Kept in memory until its next status: a restart counts again."""
        with self._lock:
            self._batches[batch_id] = replace(self._batches[batch_id], counts=counts)

    # -- on disk ------------------------------------------------------------------------------------------------

    def _listed(self, records: dict[str, Record]) -> list[Record]:
        with self._lock:
            found = list(records.values())
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    def _save(self, folder: str, record: FileRecord | BatchRecord) -> None:
        self._store.put(f"{folder}/{record.id}.json", orjson.dumps(asdict(record), default=list) + b"\n")

    def _records(self, folder: str) -> list[dict[str, Any]]:
        found = []
        for name in self._store.find(f"{folder}/"):
            if name.endswith(".json"):
                try:
                    found.append(dict(orjson.loads(self._store.read(name) or b"")))
                except (ValueError, TypeError) as error:
                    raise StorageError(f"{self.root}/{name}: damaged ({error}); remove or restore it") from None
        return found

    def _sweep(self) -> None:
        """Contents whose record was not written any more, and uploads that broke off."""
        known = {self.content(file_id) for file_id in self._files}
        with _explained(self.root):
            for path in [*(self.root / "files").glob("*.content"), *(self.root / ".tmp").iterdir()]:
                if path not in known:
                    path.unlink()


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate(error, str(root)) from error
