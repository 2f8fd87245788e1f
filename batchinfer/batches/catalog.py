"""Files and batches of OpenAI's batch API on local disk: what a server was given, and how far it is with it.

A record is one JSON file, written whole and then given its name; a content is a file beside it that never changes. All
records are in memory as well, so that a name from a request is looked up and never becomes a path.

    files/<id>.json  files/<id>.content     batches/<id>.json     work/<batch id>/ (the job's output folder)

A content comes after its record and goes before it. Nothing but records and uploads that broke off is ever removed when
a catalog is opened, and these are known by whole names and what is in them: other files in the folder are not ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import orjson

from batchinfer.errors import BatchInferError, OutputConflict, UsageError
from batchinfer.io.filesystem import translate
from batchinfer.io.storage import LocalStore, check_names, remove_files

_FOLDERS = ("files", "batches", "work")
_RECORD = re.compile(r"files/file-[0-9a-f]{32}\.json|batches/batch_[0-9a-f]{32}\.json")
_OWN = re.compile(rf"{_RECORD.pattern}|files/file-[0-9a-f]{{32}}\.content|work/batch_[0-9a-f]{{32}}/.*", re.DOTALL)
_UPLOAD = re.compile("upload-[0-9a-f]{32}")

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
    """Reason for which a batch failed. `line` counts from 1; `param` is the field of the line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class RequestCounts(NamedTuple):
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
    counts: RequestCounts = field(default_factory=RequestCounts)
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
        return cls(**{**values, "counts": RequestCounts(*values["counts"]), "problems": problems})


Record = TypeVar("Record", FileRecord, BatchRecord)


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess, and that sorts by the time it was made."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


class Catalog:
    """Catalog of files and batches below `root`, which one process has at a time. Thread-safe.

    Raises UsageError where another process has the directory, OutputConflict where something else lies in the place of
    its records, StorageError where it cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._store = LocalStore(str(self.root), self.root)
        self._refuse_foreign()
        self._lock = threading.RLock()
        with _explained(self.root):
            for folder in (*_FOLDERS, ".tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._held = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise UsageError(f"{self.root}: another process serves the batches in it; use another directory") from None
        try:
            self._files = {record.id: record for record in self._records("files", lambda values: FileRecord(**values))}
            self._batches = {record.id: record for record in self._records("batches", BatchRecord.from_values)}
            self._tidy()
        except BatchInferError:
            self.close()
            raise

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
        """Return the path of the content of a file that the catalog has."""
        return self.root / "files" / f"{file_id}.content"

    def temporary(self) -> Path:
        """Return a path for a file that `add_file` is to take; else the caller removes the file."""
        return self.root / ".tmp" / f"upload-{secrets.token_hex(16)}"

    def add_file(self, temporary: Path, filename: str, purpose: str, file_id: str | None = None) -> FileRecord:
        """Take a complete file over. With a `file_id` that is there, it takes that one's place."""
        with _explained(self.root), temporary.open("rb") as content:
            os.fsync(content.fileno())
            size = os.fstat(content.fileno()).st_size
        record = FileRecord(file_id or new_id("file-"), filename, purpose, size, int(time.time()))
        with self._lock:
            self._save("files", record)
            try:
                with _explained(self.root):
                    temporary.replace(self.content(record.id))
            except BatchInferError:
                if record.id not in self._files:
                    self._store.delete([f"files/{record.id}.json"])
                raise
            self._files[record.id] = record
        return record

    def delete_file(self, file_id: str) -> bool:
        """Delete a file; return False if there is none. A reader that has it open can read on."""
        with self._lock:
            if self._files.pop(file_id, None) is None:
                return False
            self._store.delete([f"files/{file_id}.content", f"files/{file_id}.json"])
            return True

    # -- batches ------------------------------------------------------------------------------------------------

    def batches(self) -> list[BatchRecord]:
        """Newest first."""
        return self._listed(self._batches)

    def batch(self, batch_id: str) -> BatchRecord | None:
        return self._batches.get(batch_id)

    def work(self, batch_id: str) -> Path:
        """Return the output folder of the batch's job."""
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

    def count(self, batch_id: str, counts: RequestCounts) -> None:
        """Set how far a batch is. Kept in memory until its next status: a restart counts again."""
        with self._lock:
            self._batches[batch_id] = replace(self._batches[batch_id], counts=counts)

    # -- on disk ------------------------------------------------------------------------------------------------

    def _listed(self, records: dict[str, Record]) -> list[Record]:
        with self._lock:
            found = list(records.values())
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    def _save(self, folder: str, record: FileRecord | BatchRecord) -> None:
        self._store.put(f"{folder}/{record.id}.json", orjson.dumps(asdict(record), default=list) + b"\n")

    def _refuse_foreign(self) -> None:
        """Raise OutputConflict if there is no catalog and something else lies where its records go."""
        check_names(str(self.root), _FOLDERS, [".lock"])
        found = [entry.name for folder in _FOLDERS for entry in self._store.scan(f"{folder}/")]
        foreign = sorted(name for name in found if not _OWN.fullmatch(name))
        if foreign and not any(_RECORD.fullmatch(name) for name in found):
            raise OutputConflict(
                f"{self.root}: holds {foreign[0]}, which is not an endpoint's, where files and batches are kept: use "
                "another folder"
            )

    def _records(self, folder: str, made: Callable[[dict[str, Any]], Record]) -> list[Record]:
        found = []
        for name in filter(_RECORD.fullmatch, self._store.find(f"{folder}/")):
            try:
                record = made(orjson.loads(self._store.read(name) or b""))
                if name != f"{folder}/{record.id}.json":
                    raise ValueError("another id is in it")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise OutputConflict(
                    f"{self.root}/{name}: damaged, or not an endpoint's ({error}); restore it, or move it away"
                ) from None
            found.append(record)
        return found

    def _tidy(self) -> None:
        """Remove what a kill left: records whose content had not come yet or was gone already, and uploads."""
        for file_id in [file_id for file_id in self._files if not self.content(file_id).exists()]:
            self.delete_file(file_id)
        with _explained(self.root):
            remove_files(self.root / ".tmp", _UPLOAD)


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate(error, str(root)) from error
