"""Which ids were used twice, among any number: every line of an OpenAI batch has a `custom_id` of its own."""

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
from batchinfer.io.storage import sweep
from batchinfer.log import log

MAX_REPEATED = 10_000  # lines of a file
_PARTS = 64
_NAMES = [f"ids-{part:02d}" for part in range(_PARTS)]
_FILES = re.compile(r"ids-\d\d", re.ASCII)
_ENTRY = np.dtype([("hash", "i8"), ("place", "u8")])
_LINE_BITS = 40
_AT_ONCE = 1 << 16  # ids in memory before they go to disk


class IdPlace(NamedTuple):
    """The ordinal of a line of a file, from 0."""

    file: int
    line: int


class SeenIds:
    """16 bytes each, on disk in parts by hash, of which one at a time is in memory; for use by several threads.

    `folder` is one in which nobody else keeps ids; default a temporary one. Ids are known by their hash of 64 bits:
    among 100 million one pair is taken for equal with a probability of 0.0003. Raises SpoolError if they are not kept.
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
                sweep(self._ours, _FILES)
                self._ours.rmdir()  # unless other things are in it

    def add(self, file: int, identities: Sequence[str], lines: Sequence[int]) -> None:
        """The ids of some lines of a file."""
        first = file << _LINE_BITS
        with self._lock:
            self._hashes.extend(map(hash, identities))
            self._places.extend([first + line for line in lines])
            if len(self._hashes) >= _AT_ONCE:
                self._write()

    def repeated(self) -> Iterator[tuple[IdPlace, IdPlace]]:
        """Every place whose id was used before, and where it was first: in the same file, if it is there twice."""
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
    """Where the run of equal entries begins that each entry is in."""
    places = np.arange(len(columns[0]))
    changes = [np.concatenate([[True], column[1:] != column[:-1]])[: len(places)] for column in columns]
    return np.maximum.accumulate(np.where(np.logical_or.reduce(changes), places, 0))


def _place(number: np.uint64) -> IdPlace:
    return IdPlace(int(number) >> _LINE_BITS, int(number) & ((1 << _LINE_BITS) - 1))


def repeated_lines(seen: SeenIds, urls: Sequence[str]) -> list[tuple[tuple[int, int], ...]]:
    """Of every file the lines that repeat an id of the same file, and the line that has it first.

    Every file is a batch of its own: ids that files share are but told. Raises InputError where so many are repeated
    that they cannot be ids.
    """
    found: list[dict[int, int]] = [{} for _ in urls]
    shared = 0
    example = ""
    for again, first in seen.repeated():
        if again.file != first.file:
            shared += 1
            example = example or f"{urls[first.file]}:{first.line} and {urls[again.file]}:{again.line}"
            continue
        found[again.file][again.line] = first.line
        if len(found[again.file]) > MAX_REPEATED:
            lines = f"line {again.line} that of line {first.line}"
            raise InputError(
                f"{urls[again.file]}: more than {MAX_REPEATED:,} lines repeat a custom_id, as {lines}: "
                "every request needs one of its own"
            )
    if shared:
        log.warning("files share custom_ids, and so will their answers", lines=shared, example=example)
    return [tuple(sorted(lines.items())) for lines in found]
