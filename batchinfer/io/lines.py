"""Stream of a file's lines, or of the elements of its JSON array, with a bound on line length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from batchinfer.errors import InputError
from batchinfer.io.inputs import MAX_LINE_BYTES, IndexEntry, InputLine
from batchinfer.io.json_array import elements, is_array, is_spread
from batchinfer.io.packed import decompress
from batchinfer.io.source import Source

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_FIRST_BYTES = 256
_HEAD_BYTES = 64 << 10  # enough to decide whether the file is an array


def read_lines(
    source: Source, entry: IndexEntry | None = None, seen: Callable[[bytes], None] | None = None
) -> Iterator[list[InputLine]]:
    """Yield the lines that are not blank, in lists of a few MB, from the start or from an index entry.

    The elements of a file that is one JSON array are its lines. The first bytes, not the name, decide about arrays and
    compression. Index entries are for uncompressed files only: offsets mean nothing in a compressed file. `seen` is
    called with every raw byte of the file.

    Raises InputError for UTF-16, for damaged or truncated compression, for a malformed array, and for an object over
    several lines.
    """
    if entry is not None and entry.offset:
        blocks = source.blocks(entry.offset)
        if _begins_an_array(source):
            yield from elements(source.url, blocks, entry)
        else:
            yield from _split(blocks, entry.offset, entry.line)
        return
    blocks = source.blocks() if seen is None else _observed(source.blocks(), seen)
    blocks = decompress(source, blocks)
    begun = _begin(blocks)
    head = _without_mark(begun[:_HEAD_BYTES])
    if head.startswith(_UTF16_MARKS):
        raise InputError(f"{source.url}: is UTF-16; convert it to UTF-8")
    if is_spread(head):
        raise InputError(
            f"{source.url}: contains an object over several lines: write each object on one line (`jq -c . FILE`), or "
            "all objects as one array"
        )
    blocks = itertools.chain([_without_mark(begun)], blocks)
    yield from elements(source.url, blocks) if is_array(head) else _split(blocks, 0, 1)


def _begins_an_array(source: Source) -> bool:
    first = _without_mark(source.read_at(0, _FIRST_BYTES)).lstrip()[:1]  # usually decides
    return first in (b"[", b"") and is_array(_without_mark(source.read_at(0, _HEAD_BYTES)))


def _observed(blocks: Iterator[bytes], seen: Callable[[bytes], None]) -> Iterator[bytes]:
    for block in blocks:
        seen(block)
        yield block


def _begin(blocks: Iterator[bytes]) -> bytes:
    begun = b""
    for block in blocks:
        begun += block
        if len(begun) >= _HEAD_BYTES:
            break
    return begun


def _without_mark(begun: bytes) -> bytes:
    """Replace a UTF-8 byte order mark by blanks, which keeps offsets."""
    return b"   " + begun[3:] if begun.startswith(_UTF8_MARK) else begun


def _split(blocks: Iterator[bytes], offset: int, number: int) -> Iterator[list[InputLine]]:
    held: list[bytes] = []  # the beginning of an incomplete line; emptied when it exceeds the limit
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


def _lines(pieces: list[bytes], sizes: list[int], offset: int, number: int) -> list[InputLine]:
    lines = []
    for raw, size in zip(pieces, sizes, strict=True):
        if size > MAX_LINE_BYTES:
            lines.append(InputLine(number, offset, None))
        elif raw and not raw.isspace():
            lines.append(InputLine(number, offset, raw))
        offset += size + 1
        number += 1
    return lines
