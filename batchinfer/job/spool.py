"""Finished rows and carried columns of open chunks, on local disk until their part is built.

The directory is fresh for every process, locked while its owner lives, and removed at the end; what killed processes
left behind is removed at the start. Resume never depends on it: that is what commits and salvage are for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from batchinfer.errors import SpoolError
from batchinfer.io.storage import remove_files
from batchinfer.log import log

_PREFIX = "batchinfer-spool-"
_NAME = re.compile(_PREFIX + r"[a-z0-9_]{8}")  # as tempfile makes them
_FILES = re.compile(r"\d{6,}\.(?:arrow|rows|part|recovered)|salvage\.zst|journal-\d+(?:\.zst)?|ids-\d\d", re.ASCII)
_LOCK = "lock"
_OWNER = b"a spool of batchinfer\n"  # what the lock file holds
_BUFFER_BYTES = 64 << 10  # per open chunk


class _OpenChunk:
    """A chunk whose rows are being finished: how many are left, and those not yet on disk."""

    __slots__ = ("buffer", "buffered_bytes", "left", "rows")

    def __init__(self, rows: int, left: int) -> None:
        self.rows = rows
        self.left = left
        self.buffer: list[bytes] = []
        self.buffered_bytes = 0


class Spool:
    """Thread-safe: rows are added by one thread while others open chunks, build parts and write the salvage.

    Raises SpoolError, with the path and what to do, where the disk is full or not writable.
    """

    def __init__(self, base: Path | None = None) -> None:
        base = base or Path(tempfile.gettempdir())
        self._lock = threading.Lock()
        self._open: dict[int, _OpenChunk] = {}
        self.changes = 0  # rows added so far: whether a salvage would hold anything new
        with explained(base):
            base.mkdir(parents=True, exist_ok=True)
            _sweep(base)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._lock_file = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock_file, _OWNER)

    def close(self) -> None:
        _remove(self.path)
        os.close(self._lock_file)

    def open(self, chunk: int, rows: int, finished: Iterable[bytes], carried: pa.Table) -> int:
        """Begin a chunk of `rows` selected rows, some of which are finished. Returns how many are left."""
        lines = list(finished)
        with explained(self.path):
            with pa.OSFile(str(self._carried(chunk)), "wb") as sink, pa.ipc.new_file(sink, carried.schema) as writer:
                writer.write_table(carried)
            with self._rows(chunk).open("wb") as file:
                file.write(b"".join(line + b"\n" for line in lines))
        left = rows - len(lines)
        with self._lock:
            self._open[chunk] = _OpenChunk(rows, left)
            self.changes += len(lines)
        return left

    def add(self, chunk: int, line: bytes) -> bool:
        """Append a finished row; True if it was the chunk's last."""
        with self._lock:
            opened = self._open[chunk]
            opened.buffer.append(line)
            opened.buffered_bytes += len(line)
            opened.left -= 1
            self.changes += 1
            if opened.buffered_bytes >= _BUFFER_BYTES:
                self._flush(chunk, opened)
            return opened.left == 0

    def lines(self, chunk: int) -> bytes:
        """Return all finished rows of an open chunk so far, a line each."""
        with self._lock, explained(self.path):  # while it is read, nobody drops it
            self._flush(chunk, self._open[chunk])
            return self._rows(chunk).read_bytes()

    def carried(self, chunk: int) -> pa.Table:
        with explained(self.path), pa.memory_map(str(self._carried(chunk))) as source:
            return pa.ipc.open_file(source).read_all()

    def scratch(self, name: str) -> Path:
        """Return a path for a file of the caller, who removes it."""
        return self.path / name

    def drop(self, chunk: int) -> None:
        """Forget a chunk that is committed."""
        with self._lock:
            self._open.pop(chunk)
        self._carried(chunk).unlink(missing_ok=True)
        self._rows(chunk).unlink(missing_ok=True)

    def finished(self) -> Iterator[tuple[int, bytes]]:
        """Yield the finished rows of every open chunk that has some, for the salvage."""
        with self._lock:
            chunks = sorted(self._open)
        for chunk in chunks:
            with contextlib.suppress(KeyError):  # committed meanwhile
                lines = self.lines(chunk)
                if lines:
                    yield chunk, lines

    def _flush(self, chunk: int, opened: _OpenChunk) -> None:
        if opened.buffer:
            with explained(self.path), self._rows(chunk).open("ab") as file:
                file.write(b"\n".join(opened.buffer) + b"\n")
            opened.buffer.clear()
            opened.buffered_bytes = 0

    def _carried(self, chunk: int) -> Path:
        return self.path / f"{chunk:06d}.arrow"

    def _rows(self, chunk: int) -> Path:
        return self.path / f"{chunk:06d}.rows"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """OSError of the spool directory into SpoolError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space there" if full else "make it writable"
        reason = error.strerror or str(error)
        raise SpoolError(f"spool {path}: {reason}: {todo}, or use another disk with --spool-dir") from error


def _sweep(base: Path) -> None:
    """Remove spools whose owner is gone: a lock says so across containers, where process ids mean nothing."""
    for path in base.glob(f"{_PREFIX}*"):
        if not _NAME.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            file = os.open(path / _LOCK, os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            continue  # being made right now, or somebody else's
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.read(file, len(_OWNER) + 1) == _OWNER:
                log.debug("removing the spool of a killed run", path=str(path))
                _remove(path)
        except OSError:
            continue
        finally:
            os.close(file)


def _remove(folder: Path) -> None:
    """Remove a spool: the files that its owner makes, and the folder if nobody else has put something into it."""
    with contextlib.suppress(OSError):
        remove_files(folder, _FILES)
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()
