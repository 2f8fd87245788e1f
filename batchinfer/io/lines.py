"""A file of lines as a stream: decompression, splitting, and lines too long to hold."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import zstandard

from batchinfer.errors import InputError
from batchinfer.io.inputs import IndexEntry
from batchinfer.io.source import Source

MAX_LINE_BYTES = 64 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# compressed bytes per call: what one call returns is then bounded, whatever the ratio
_FEED_BYTES = 8 << 10


class Line(NamedTuple):
    """A line that is not blank: its number, from 1, its byte offset, and its content, None above MAX_LINE_BYTES."""

    number: int
    offset: int
    raw: bytes | None


def compressed(source: Source) -> bool:
    return source.read_at(0, 4).startswith((_GZIP, _ZSTD))


def read_lines(
    source: Source, entry: IndexEntry | None = None, seen: Callable[[bytes], None] | None = None
) -> Iterator[list[Line]]:
    """Lines that are not blank, in lists of a few MB, from the start or from an index entry of an uncompressed file.

    What the first bytes say decides about compression, not the name. Offsets mean nothing in a compressed file.
    `seen` is given every byte of the file as it lies there.
    Raises InputError for UTF-16 and for damaged or truncated compression.
    """
    if entry is not None and entry.offset:
        yield from _split(source.blocks(entry.offset), entry.offset, entry.line)
        return
    head = source.read_at(0, 4)
    blocks = source.blocks() if seen is None else _shown(source.blocks(), seen)
    if head.startswith(_GZIP):
        blocks = _decompress(source.url, blocks, "gzip")
    elif head.startswith(_ZSTD):
        blocks = _decompress(source.url, blocks, "zstd")
    yield from _split(_without_mark(source.url, blocks), 0, 1)


def _shown(blocks: Iterator[bytes], seen: Callable[[bytes], None]) -> Iterator[bytes]:
    for block in blocks:
        seen(block)
        yield block


def _without_mark(url: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Replaces a UTF-8 byte order mark by blanks, which keeps offsets as they are."""
    first = next(blocks, b"")
    if first.startswith(_UTF16_MARKS):
        raise InputError(f"{url}: is UTF-16; convert it to UTF-8")
    yield b"   " + first[3:] if first.startswith(_UTF8_MARK) else first
    yield from blocks


def _split(blocks: Iterator[bytes], offset: int, number: int) -> Iterator[list[Line]]:
    held: list[bytes] = []  # the beginning of a line that goes on in the next block; emptied when it gets too long
    held_bytes = 0
    for block in blocks:
        pieces = block.split(b"\n")
        rest = pieces.pop()
        if pieces:
            sizes = [held_bytes + len(pieces[0]), *map(len, pieces[1:])]
            pieces[0] = b"".join([*held, pieces[0]])
            yield _lines(pieces, sizes, offset, number)
            offset += sum(sizes) + len(sizes)
            number += len(sizes)
            held, held_bytes = [], 0
        held.append(rest)
        held_bytes += len(rest)
        if held_bytes > MAX_LINE_BYTES:
            held = []
    yield _lines([b"".join(held)], [held_bytes], offset, number)


def _lines(pieces: list[bytes], sizes: list[int], offset: int, number: int) -> list[Line]:
    lines = []
    for raw, size in zip(pieces, sizes, strict=True):
        if size > MAX_LINE_BYTES:
            lines.append(Line(number, offset, None))
        elif raw and not raw.isspace():
            lines.append(Line(number, offset, raw))
        offset += size + 1
        number += 1
    return lines


def _decompress(url: str, blocks: Iterator[bytes], kind: str) -> Iterator[bytes]:
    """All members or frames of a compressed file, one after the other."""
    members = _Members(kind)
    try:
        for data in _portions(blocks):
            yield from members.feed(data)
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{url}: damaged {kind} data: {error}") from error
    if members.unfinished:
        raise InputError(f"{url}: the {kind} data ends early: the file is truncated")


def _portions(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Little enough at a time that what comes out of it stays small."""
    for block in blocks:
        for start in range(0, len(block), _FEED_BYTES):
            yield block[start : start + _FEED_BYTES]


class _Members:
    """Decoders one after the other: a file may be several compressed ones joined."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._decoder: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if not self.unfinished:
                self._decoder = self._new()
            if output := self._decoder.decompress(data):
                yield output
            data = self._decoder.unused_data if self._decoder.eof else b""

    @property
    def unfinished(self) -> bool:
        return self._decoder is not None and not self._decoder.eof

    def _new(self) -> Any:
        if self._kind == "gzip":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
