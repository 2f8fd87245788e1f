"""Writes summaries (see job.summaries): of a worker's chunks as it commits them, and at the end of what was shared."""

from __future__ import annotations

import os.path
import threading
from collections import Counter

from batchinfer.job.ledger import CommitKey, CommitRecord, Ledger, Listing
from batchinfer.job.shard import Shard
from batchinfer.job.summaries import MIN_RECORDS, SIZES, Entry, Stretch, encode, md5
from batchinfer.log import log


class SummaryWriter:
    """Told of each commit of pass `number`, it writes the summary of the largest stretch that the commit ends.

    Chunks count in the order of this worker's share: stretch k of a size has those from k · size on.
    """

    def __init__(self, listing: Listing, shard: Shard, number: int, chunks: list[int], before: list[int]) -> None:
        """`chunks` are this worker's to commit; those `before` were done when the listing was made."""
        self._listing = listing
        self._number = number
        self._shard = shard
        self._own = {*chunks, *before}
        self._lock = threading.Lock()
        self._open = {size: Counter(self._place(chunk) // size for chunk in chunks) for size in SIZES}
        self._lines: dict[int, bytes] = {}  # chunk → record, committed by this run and in no stretch of the last size
        self._marked_by_md5: bool | None = None  # None: not known yet
        self._off = False

    def add_record(self, record: CommitRecord) -> None:
        """Note a commit, and write the summary that it completes. Called by committing threads; raises nothing."""
        with self._lock:
            if self._off:
                return
            self._lines[record.chunk] = record.to_bytes()
            size = self._ended(self._place(record.chunk))
            if not size:
                return
            stretch = self._stretch(self._place(record.chunk) // size * size, size)
            own = [chunk for chunk in stretch.chunks if chunk in self._own]
            lines = {chunk: self._lines[chunk] for chunk in own if chunk in self._lines}
            if size == SIZES[-1]:
                for chunk in lines:
                    del self._lines[chunk]
        if len(own) < MIN_RECORDS or stretch in self._listing.stretches:
            return
        try:
            self._fold(stretch, own, lines)
        except Exception as error:
            self._off = True
            _warn(self._listing.ledger, error)

    def _place(self, chunk: int) -> int:
        return chunk // self._shard.count

    def _ended(self, place: int) -> int:
        """Return the size of the largest stretch without an open chunk now, 0 if there is none."""
        for size in SIZES:
            self._open[size][place // size] -= 1
        return max((size for size in SIZES if not self._open[size][place // size]), default=0)

    def _stretch(self, place: int, size: int) -> Stretch:
        step = self._shard.count
        first = self._shard.index + place * step
        count = min(size, len(range(first, len(self._listing.ledger.plan.chunks), step)))
        return Stretch(first, step, count, self._number)

    def _fold(self, stretch: Stretch, own: list[int], lines: dict[int, bytes]) -> None:
        entries = {chunk: Entry(lines[chunk], mark) for chunk, mark in self._marks(lines).items()}
        if self._off:
            return
        before = [CommitKey(chunk, self._number) for chunk in own if chunk not in lines]
        entries |= {key.chunk: entry for key, entry in self._listing.entries(before)}
        write(self._listing.ledger, stretch, entries)

    def _marks(self, lines: dict[int, bytes]) -> dict[int, str]:
        """Under which marks the store has these records, which this run has put."""
        names = {CommitKey(chunk, self._number).name: chunk for chunk in lines}
        scan = self._listing.ledger.store.scan
        if self._marked_by_md5 is None:
            name, chunk = next(iter(names.items()))
            mark = next((entry.mark for entry in scan(name) if entry.name == name), None)
            self._off = mark is None
            self._marked_by_md5 = mark == md5(lines[chunk])
        if self._marked_by_md5 or self._off:
            return {chunk: md5(line) for chunk, line in lines.items()}
        marks = {}
        for name, size, mark in scan(os.path.commonprefix(list(names))):  # noqa: RUF071 - a prefix of names
            if name in names and mark is not None and size == len(lines[names[name]]):
                marks[names[name]] = mark
        return marks


def compact(listing: Listing, pass_number: int) -> None:
    """Write the summaries that are missing once all chunks are done; `listing` has them afterwards. Raises nothing."""
    ledger, size = listing.ledger, SIZES[-1]
    chunks = len(ledger.plan.chunks)
    try:
        for first in range(0, chunks, size):
            stretch = Stretch(first, 1, min(size, chunks - first), pass_number)
            own = (CommitKey(chunk, pass_number) for chunk in stretch.chunks)
            keys = [key for key in own if key in listing.records]
            if len(keys) < MIN_RECORDS or listing.requests(keys) <= 2 or listing.records[keys[0]][1] is None:
                continue
            entries = {key.chunk: entry for key, entry in listing.entries(keys)}
            write(ledger, stretch, entries)
            listing.stretches.add(stretch)
    except Exception as error:
        _warn(ledger, error)


def write(ledger: Ledger, stretch: Stretch, entries: dict[int, Entry]) -> None:
    """Put the summary of these records (chunk → entry), unless it is there."""
    data = encode(ledger.plan.digest, [entry for _, entry in sorted(entries.items())])
    ledger.store.put_if_absent(stretch.name(ledger.plan), data)


def _warn(ledger: Ledger, error: Exception) -> None:
    log.warning(
        "no more summaries are written: commit records will be read one by one", output=ledger.store.url, why=str(error)
    )
