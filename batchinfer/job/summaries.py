"""Summaries: the bytes of many commit records in one object, so that readers need not ask for each record.

A summary is a cache. The records stay, and are what counts: an entry is used only while the listing shows its record
with the entry's size and mark, else the record itself is read, as it is where no summary exists.

- Content: the records of one stretch, every `step`-th chunk from `first` on, `length` of them, in one pass. The name
  identifies the stretch and carries the plan's mark. The bytes follow from the records alone.
- Writer: a worker whose commit ends a stretch of 16, 256 or 4,096 of its own chunks (`job.summary_writer`), so that few
  of its records are in no summary at any moment; at the end of the job its last worker, for stretches that several
  workers shared. It is put if absent; a failure to write it is logged and harmless.
- Proof: where a store marks an object with the MD5 of its bytes, as S3 does, an entry's mark is computed from the entry
  and agrees only if the record has these very bytes. Where marks are something else (encrypted buckets, other clouds),
  the summary lists those under which the records were found. Where there are none (local disk), no summary is written
  or read: a small file is read as fast as it is listed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import orjson
import zstandard

from batchinfer.job.plan import JobPlan

SUMMARIES = "summaries/"
SIZES = (16, 256, 4096)  # chunks of a stretch
MIN_RECORDS = 8  # fewer are as well read one by one
_FORMAT = 1
_MAX_BYTES = 256 << 20  # of a summary's content; the largest stretch has about 2 MB
_NAME = re.compile(
    r"summaries/(\d{6,12})-(\d{1,12})-(\d{1,12})(?:\.r([1-9]\d{0,8}))?-([0-9a-f]+)\.jsonl\.zst", re.ASCII
)


class Stretch(NamedTuple):
    """Every `step`-th chunk from `first` on, `length` of them, and their records of one pass."""

    first: int
    step: int
    length: int
    pass_number: int

    @property
    def chunks(self) -> range:
        return range(self.first, self.first + self.step * self.length, self.step)

    def name(self, plan: JobPlan) -> str:
        retry = f".r{self.pass_number}" if self.pass_number else ""
        return f"{SUMMARIES}{self.first:06d}-{self.step}-{self.length}{retry}-{plan.mark}.jsonl.zst"


def stretch_of(name: str, plan: JobPlan) -> Stretch | None:
    """Return the stretch that a name stands for; None for a name that a job of this plan does not give."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stretch = Stretch(int(match[1]), int(match[2]), int(match[3]), int(match[4] or 0))
    ours = stretch.step and stretch.length and stretch.chunks[-1] < len(plan.chunks) and name == stretch.name(plan)
    return stretch if ours else None


class Entry(NamedTuple):
    """A record's bytes, and the mark under which the store lists them."""

    line: bytes
    mark: str


def md5(line: bytes) -> str:
    return hashlib.md5(line, usedforsecurity=False).hexdigest()


def encode(digest: str, entries: list[Entry]) -> bytes:
    """Return the content of a summary. `digest`: of the plan. Records are lines by themselves."""
    marks = None if all(entry.mark == md5(entry.line) for entry in entries) else [entry.mark for entry in entries]
    header = orjson.dumps({"format": _FORMAT, "fingerprint": digest, "marks": marks})
    lines = b"".join(entry.line for entry in entries)
    return zstandard.ZstdCompressor(write_checksum=True).compress(header + b"\n" + lines)


def decode(data: bytes, digest: str) -> list[Entry]:
    """Raise ValueError for bytes that are no summary of this plan's records."""
    try:
        if zstandard.frame_content_size(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_BYTES)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    head, *lines = content.splitlines(keepends=True)
    header = orjson.loads(head)
    if not isinstance(header, dict) or (header.get("format"), header.get("fingerprint")) != (_FORMAT, digest):
        raise ValueError("it belongs to another job")
    marks = header.get("marks")
    if marks is None:
        marks = map(md5, lines)
    elif not isinstance(marks, list) or len(marks) != len(lines) or not all(isinstance(mark, str) for mark in marks):
        raise ValueError("its marks are not those of its records")
    return list(map(Entry, lines, marks))


def cover(stretches: Iterable[Stretch], chunks: int, wanted: Iterable[tuple[int, int]]) -> list[Stretch]:
    """Return the stretches to read for these (chunk, pass), as few as possible; each covers several of them.

    `chunks`: how many the plan has.
    """
    open_: dict[int, bytearray] = {}  # pass → 1 for each chunk that is wanted and in no stretch chosen yet
    for chunk, number in wanted:
        open_.setdefault(number, bytearray(chunks))[chunk] = 1
    chosen = []
    for stretch in sorted(stretches, key=lambda stretch: (-stretch.length, stretch)):
        flags = open_.get(stretch.pass_number)
        among = slice(stretch.chunks.start, stretch.chunks[-1] + 1, stretch.step)
        if flags is not None and flags[among].count(1) > 1:
            flags[among] = bytes(stretch.length)
            chosen.append(stretch)
    return sorted(chosen)
