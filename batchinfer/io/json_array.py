"""A file that is one JSON array: its elements, one after the other, as if each stood on a line.

Elements are cut out by their brackets and strings alone, in bounded memory however long the array's lines are; whether
an element is valid JSON is for its reader to say. What is wrong between elements is the file's error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import orjson

from batchinfer.errors import InputError
from batchinfer.io.inputs import MAX_LINE_BYTES, IndexEntry, InputLine

_QUOTE = 0x22

_STRING = rb'(?:[^"\\]++|\\.)*+'  # what stands between quotes


def _nested(levels: int) -> bytes:
    """What is in an object or list, brackets within it up to so many levels."""
    inside = rb'[^"{}\[\]]++|"' + _STRING + b'"'
    return b"(?:" + inside + (rb"|[{\[]" + _nested(levels - 1) + rb"[}\]]" if levels else b"") + b")*+"


_BLANK = re.compile(rb"[ \t\r\n]*+")
_NEXT = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+(\{" + _nested(4) + rb"\})", re.DOTALL)  # nearly all elements
_STRUCTURE = re.compile(rb'[{}\[\]]|"(?:' + _STRING + b'")?+', re.DOTALL)  # strings whole, where they are here
_IN_STRING = re.compile(_STRING, re.DOTALL)
_SCALAR = re.compile(rb'[^,\[\]{}" \t\r\n]*+')
_QUOTE = 0x22


def is_array(head: bytes) -> bool:
    """Whether a file that begins so is one array. Lines that each hold a list are not, and a broken line makes none."""
    text = head.lstrip()
    if not text.startswith(b"["):
        return False
    first, _, rest = text.partition(b"\n")
    rest = rest.lstrip()
    inside = text[1:].lstrip()
    if rest and _parses(first, list):
        return False
    return first.strip() == b"[" or inside.startswith((b"{", b"]")) or not _parses(rest.partition(b"\n")[0], dict)


def is_spread(head: bytes) -> bool:
    """Whether a file that begins so is an object over several lines."""
    first, _, rest = head.lstrip().partition(b"\n")
    return first.strip() == b"{" and rest.lstrip().startswith((b'"', b"}"))


def _parses(text: bytes, kind: type) -> bool:
    try:
        return isinstance(orjson.loads(text), kind)
    except orjson.JSONDecodeError:
        return False


def elements(url: str, blocks: Iterator[bytes], begin: IndexEntry | None = None) -> Iterator[list[InputLine]]:
    """The elements of the array that `blocks` hold, from its beginning, or from where one of them begins.

    Raises InputError, which names the element, for what no array has between its elements, and where it ends early.
    """
    array = _Array(url, begin)
    for block in blocks:
        yield array.feed(block)
    array.close()


class _Array:
    """Cuts pieces of an array into elements; `_data` is what is not cut yet."""

    def __init__(self, url: str, begin: IndexEntry | None) -> None:
        self._url = url
        self._data = bytearray()
        self._at = 0  # up to here _data has been looked at
        self._offset = begin.offset if begin else 0  # of _data[0] in the file
        self._number = begin.line if begin else 1  # line of _data[0]
        self._element = begin.row if begin else 0
        self._expected: Literal["[", "first", "value", "comma", "nothing"] = "value" if begin else "["
        self._open: _ElementScan | None = None  # the element that begins at _data[0] and does not end in it

    def feed(self, block: bytes) -> list[InputLine]:
        self._data += block
        lines: list[InputLine] = []
        while True:
            if self._open is None:
                lines += self._run()
                if not self._next():
                    return lines
            line = self._rest()
            if line is None:
                return lines
            lines.append(line)

    def _run(self) -> list[InputLine]:
        """The objects that come next, as long as they are whole and nested little: nearly all of most files."""
        data, at, number = self._data, 0, self._number
        lines: list[InputLine] = []
        while self._expected == "comma" and (match := _NEXT.match(data, at)) is not None:
            begin, end = match.span(1)
            number += data.count(b"\n", at, begin)
            raw = match[1] if end - begin <= MAX_LINE_BYTES else None
            lines.append(InputLine(number, self._offset + begin, raw, self._element + len(lines)))
            number += data.count(b"\n", begin, end)
            at = end
        self._element += len(lines)
        self._drop(at)
        return lines

    def close(self) -> None:
        """Raises InputError unless the array has ended."""
        where = f"in element [{self._element}], which begins" if self._open else f"before element [{self._element}]"
        if self._expected != "nothing":
            raise self._error(f"the array is not closed: the file ends {where}" + (" here" if self._open else ""))

    def _next(self) -> bool:
        """Go on to where the next element begins. False if nothing more is here."""
        while True:
            self._drop(_end(_BLANK.match(self._data)))
            if not self._data:
                return False
            char = bytes(self._data[:1])
            if self._expected in ("first", "value") and char not in (b"]", b",", b"}", b":"):
                self._open = _ElementScan()
                return True
            self._expected = self._after(char)
            self._drop(1)

    def _after(self, char: bytes) -> Literal["first", "value", "nothing"]:
        """What is expected after a character between elements."""
        expected, number = self._expected, self._element
        if expected == "[":
            return "first"
        if expected == "comma" and char == b",":
            return "value"
        if expected in ("comma", "first") and char == b"]":
            return "nothing"
        if expected == "comma":
            raise self._error(f"a comma is missing before element [{number}]")
        if expected == "nothing":
            raise self._error("more follows the array's end: a file is one array, or has one object on each line")
        if char == b"]":
            raise self._error(f"element [{number}] is missing: the array ends after a comma")
        raise self._error(f"element [{number}] is missing: {char.decode()!r} stands in its place")

    def _rest(self) -> InputLine | None:
        """The element that begins at _data[0], None if its end is not here."""
        assert self._open is not None
        value = self._open
        self._at, whole = value.find_end(self._data, self._at)
        if not whole and self._at > MAX_LINE_BYTES:  # of one that is too long, only the end matters
            value.dropped += self._at
            value.dropped_lines += self._data.count(b"\n", 0, self._at)
            del self._data[: self._at]
            self._at = 0
        if not whole:
            return None
        size = value.dropped + self._at
        raw = bytes(self._data[: self._at]) if size <= MAX_LINE_BYTES else None
        line = InputLine(self._number, self._offset, raw, self._element)
        self._number += value.dropped_lines
        self._offset += value.dropped
        self._drop(self._at)
        self._open, self._at, self._expected = None, 0, "comma"
        self._element += 1
        return line

    def _drop(self, count: int) -> None:
        self._number += self._data.count(b"\n", 0, count)
        self._offset += count
        del self._data[:count]

    def _error(self, text: str) -> InputError:
        return InputError(f"{self._url}:{self._number}: {text}")


class _ElementScan:
    """How far a value goes that comes piece by piece. `dropped`: bytes and line ends of it that are not kept."""

    def __init__(self) -> None:
        self._scalar: bool | None = None  # no string, object or list
        self._depth = 0
        self._in_string = False
        self.dropped = 0
        self.dropped_lines = 0

    def find_end(self, data: bytearray, at: int) -> tuple[int, bool]:
        """Where looking from `at` came to, and whether that is the end."""
        if self._scalar is None:
            self._scalar = bytes(data[:1]) not in (b'"', b"{", b"[")
        if self._scalar:
            at = _end(_SCALAR.match(data, at))
            return at, at < len(data)
        while at < len(data):
            if self._in_string:
                at = _end(_IN_STRING.match(data, at))
                if data[at : at + 1] != b'"':  # the end of the piece, perhaps within an escape
                    return at, False
                at += 1
                self._in_string = False
            elif (found := _STRUCTURE.search(data, at)) is not None:
                char, at = data[found.start()], found.end()
                self._in_string = char == _QUOTE and found.end() - found.start() == 1
                self._depth += (char in b"{[") - (char in b"}]")
            else:
                return len(data), False
            if not self._depth and not self._in_string:
                return at, True
        return at, False


def _end(match: re.Match[bytes] | None) -> int:
    assert match is not None, "an expression that matches nothing as well"
    return match.end()
