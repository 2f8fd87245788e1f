"""Detection of duplicate ids among any number: every line of an OpenAI batch needs its own `custom_id`."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from batchinfer.errors import InputError, SpoolError
from batchinfer.io.storage import remove_files
from batchinfer.log import log

MAX_REPEATED = 10_000  # lines per file
_PARTS = 64
_NAMES = [f"ids-{part:02d}" for part in range(_PARTS)]
_FILES = re.compile(r"ids-\d\d", re.ASCII)
_ENTRY = np.dtype([("hash", "i8"), ("place", "u8")])
_LINE_BITS = 40
_BUFFERED_IDS = 1 << 16  # ids in memory before they are written to disk


class IdPlace(NamedTuple):
    """A line of a file, by the ordinals of both, from 0."""

    file: int
    line: int


class SeenIds:
    """On-disk set of ids, 16 bytes each, in partitions by hash of which one at a time is in memory; thread-safe.

    `folder` must be used by nothing else; default a temporary one. Ids are compared by 64-bit hash: among 100 million
    ids the probability of a false duplicate is 0.0003. Raises SpoolError if the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._ours: Path | None = None
        self._hashes = array("q")
        self._places = array("Q")  # file and line
        self._lock = threading.Lock()

    def close(self) -> None:
        if self._ours is not None:
            with contextlib.suppress(OSError):
                remove_files(self._ours, _FILES)
                self._ours.rmdir()  # fails if it holds other files

    def add(self, file: int, identities: Sequence[str], lines: Sequence[int]) -> None:
        """Add the ids of some lines of a file."""
        first = file << _LINE_BITS
        with self._lock:
            self._hashes.extend(map(hash, identities))
            self._places.extend([first + line for line in lines])
            if len(self._hashes) >= _BUFFERED_IDS:
                self._write()

    def repeated(self) -> Iterator[tuple[IdPlace, IdPlace]]:
        """Yield the place of every repeated id and of its first use, in the same file if it occurs there twice."""
        for hashes, places in self._parts():
            order = np.lexsort((places, hashes))
            hashes, places = hashes[order], places[order]
            files = places >> _LINE_BITS
            first = np.where(_begins(hashes, files) < np.arange(len(order)), _begins(hashes, files), _begins(hashes))
            for again in np.flatnonzero(first < np.arange(len(order))):
                yield _place(places[again]), _place(places[first[again]])

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._ours is None:
            yield np.array(self._hashes), np.array(self._places)
            return
        self._write()
        for path in map(self._ours.joinpath, _NAMES):
            entries = np.fromfile(path, _ENTRY)
            yield entries["hash"], entries["place"]

    def _write(self) -> None:
        entries = np.empty(len(self._hashes), _ENTRY)
        entries["hash"], entries["place"] = self._hashes, self._places
        del self._hashes[:], self._places[:]
        parts = entries["hash"] % _PARTS
        try:
            if self._ours is None:
                self._ours = self._folder or Path(tempfile.mkdtemp(prefix="batchinfer-ids-"))
                self._ours.mkdir(parents=True, exist_ok=True)
            for part, name in enumerate(_NAMES):
                with (self._ours / name).open("ab") as file:
                    file.write(entries[parts == part].tobytes())
        except OSError as error:
            raise SpoolError(f"{self._ours or self._folder}: cannot be written: {error.strerror or error}") from error


def _begins(*columns: np.ndarray) -> np.ndarray:
    """Return, for each entry, the index at which its run of equal entries begins."""
    places = np.arange(len(columns[0]))
    changes = [np.concatenate([[True], column[1:] != column[:-1]])[: len(places)] for column in columns]
    return np.maximum.accumulate(np.where(np.logical_or.reduce(changes), places, 0))


def _place(number: np.uint64) -> IdPlace:
    return IdPlace(int(number) >> _LINE_BITS, int(number) & ((1 << _LINE_BITS) - 1))


def repeated_lines(seen: SeenIds, urls: Sequence[str]) -> list[tuple[tuple[int, int], ...]]:
    """Return, for every file, pairs of a line that repeats an id of the same file and the first line with it.

    Every file is a batch of its own: ids shared between files are only logged. Raises InputError for more than
    MAX_REPEATED repetitions: such values are not ids.
    """
    repeated: list[dict[int, int]] = [{} for _ in urls]
    shared = 0
    example = ""
    for again, first in seen.repeated():
        if again.file != first.file:
            shared += 1
            example = example or f"{urls[first.file]}:{first.line} and {urls[again.file]}:{again.line}"
            continue
        repeated[again.file][again.line] = first.line
        if len(repeated[again.file]) > MAX_REPEATED:
            lines = f"line {again.line} repeats line {first.line}"
            raise InputError(
                f"{urls[again.file]}: more than {MAX_REPEATED:,} lines repeat a custom_id ({lines}): "
                "every request needs its own"
            )
    if shared:
        log.warning("files share custom_ids, and so will their results", lines=shared, example=example)
    return [tuple(sorted(lines.items())) for lines in repeated]
