"""Reader of files that are one JSON array: yields its elements like lines.

Elements are split by brackets and strings alone, in bounded memory however long the array's lines are; their reader
validates each element's JSON. Errors between elements are errors of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import orjson

from batchinfer.errors import InputError
from batchinfer.io.inputs import MAX_LINE_BYTES, IndexEntry, InputLine

_STRING = rb'(?:[^"\\]++|\\.)*+'  # the inside of a string


def _nested(levels: int) -> bytes:
    """Return a pattern for the inside of an object or list, with brackets nested up to `levels` deep."""
    inside = rb'[^"{}\[\]]++|"' + _STRING + b'"'
    item = inside + (rb"|[{\[]" + _nested(levels - 1) + rb"[}\]]" if levels else b"")
    # an atomic group: before Python 3.11.5 a possessive repeat of items that can fail half-way loses its position
    # (https://github.com/python/cpython/issues/106052)
    return b"(?>(?:" + item + b")*)"


_BLANK = re.compile(rb"[ \t\r\n]*+")
_NEXT = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+(\{" + _nested(4) + rb"\})", re.DOTALL)  # matches nearly all elements
_STRUCTURE = re.compile(rb'[{}\[\]]|"(?:' + _STRING + b'"|)', re.DOTALL)  # whole strings, or an opening quote
_IN_STRING = re.compile(_STRING, re.DOTALL)
_SCALAR = re.compile(rb'[^,\[\]{}" \t\r\n]*+')
_QUOTE = 0x22


def is_array(head: bytes) -> bool:
    """Return True if a file with this beginning is one array.

    Lines that each hold a list are not an array, even if one of them is broken.
    """
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
    """Return True if a file with this beginning is an object over several lines."""
    first, _, rest = head.lstrip().partition(b"\n")
    return first.strip() == b"{" and rest.lstrip().startswith((b'"', b"}"))


def _parses(text: bytes, kind: type) -> bool:
    try:
        return isinstance(orjson.loads(text), kind)
    except orjson.JSONDecodeError:
        return False


def elements(url: str, blocks: Iterator[bytes], begin: IndexEntry | None = None) -> Iterator[list[InputLine]]:
    """Yield the elements of the array in `blocks`, from its beginning or from the beginning of an element.

    Raises InputError, which names the element, for invalid text between elements and for a truncated array.
    """
    array = _Array(url, begin)
    for block in blocks:
        yield array.feed(block)
    array.close()


class _Array:
    """Incremental splitter of an array into elements; `_data` holds the bytes that are not split yet."""

    def __init__(self, url: str, begin: IndexEntry | None) -> None:
        self._url = url
        self._data = bytearray()
        self._at = 0  # _data has been searched up to here
        self._offset = begin.offset if begin else 0  # of _data[0] in the file
        self._number = begin.line if begin else 1  # line of _data[0]
        self._element = begin.row if begin else 0
        self._expected: Literal["[", "first", "value", "comma", "nothing"] = "value" if begin else "["
        self._open: _ElementScan | None = None  # an element that begins at _data[0] and is not complete

    def feed(self, block: bytes) -> list[InputLine]:
        self._data += block
        lines: list[InputLine] = []
        while True:
            if self._open is None:
                lines += self._split_simple()
                if not self._advance():
                    return lines
            line = self._finish_element()
            if line is None:
                return lines
            lines.append(line)

    def _split_simple(self) -> list[InputLine]:
        """Return the next complete, shallowly nested objects in one go: nearly all elements of most files."""
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
        """Check that the array has ended. Raises InputError otherwise."""
        where = f"in element [{self._element}], which begins" if self._open else f"before element [{self._element}]"
        if self._expected != "nothing":
            raise self._error(f"the array is not closed: the file ends {where}" + (" here" if self._open else ""))

    def _advance(self) -> bool:
        """Advance to the beginning of the next element. Return False if more data is needed."""
        while True:
            self._drop(_end(_BLANK.match(self._data)))
            if not self._data:
                return False
            char = bytes(self._data[:1])
            if self._expected in ("first", "value") and char not in (b"]", b",", b"}", b":"):
                self._open = _ElementScan()
                return True
            self._expected = self._token_after(char)
            self._drop(1)

    def _token_after(self, char: bytes) -> Literal["first", "value", "nothing"]:
        """Return the expected token after a character between elements."""
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
            raise self._error("text follows the end of the array: a file is one array, or has one object per line")
        if char == b"]":
            raise self._error(f"element [{number}] is missing: the array ends after a comma")
        raise self._error(f"element [{number}] is missing: found {char.decode()!r} instead")

    def _finish_element(self) -> InputLine | None:
        """Return the element that begins at _data[0], or None if its end is not in the data yet."""
        assert self._open is not None
        value = self._open
        self._at, whole = value.find_end(self._data, self._at)
        if not whole and self._at > MAX_LINE_BYTES:  # too long to keep: only its end matters
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
    """State of the search for the end of a value that arrives in pieces.

    `dropped`, `dropped_lines`: bytes and line ends cut.
    """

    def __init__(self) -> None:
        self._scalar: bool | None = None  # neither string, object nor list
        self._depth = 0
        self._in_string = False
        self.dropped = 0
        self.dropped_lines = 0

    def find_end(self, data: bytearray, at: int) -> tuple[int, bool]:
        """Return the position that the search from `at` reached, and True if the value ends there."""
        if self._scalar is None:
            self._scalar = bytes(data[:1]) not in (b'"', b"{", b"[")
        if self._scalar:
            at = _end(_SCALAR.match(data, at))
            return at, at < len(data)
        while at < len(data):
            if self._in_string:
                at = _end(_IN_STRING.match(data, at))
                if data[at : at + 1] != b'"':  # the end of the data, perhaps within an escape
                    return at, False
                at += 1
                self._in_string = False
            elif (match := _STRUCTURE.search(data, at)) is not None:
                char, at = data[match.start()], match.end()
                self._in_string = char == _QUOTE and match.end() - match.start() == 1
                self._depth += (char in b"{[") - (char in b"}]")
            else:
                return len(data), False
            if not self._depth and not self._in_string:
                return at, True
        return at, False


def _end(match: re.Match[bytes] | None) -> int:
    assert match is not None, "the expression also matches the empty string"
    return match.end()
