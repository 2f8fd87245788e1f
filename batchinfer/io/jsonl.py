"""JSON lines: one full scan for rows, types and seek points, then rows by range, and writing.

A column has the one type that all its values have (null fits any). Everything else (integers mixed with fractions,
nested values, mixed types, integers beyond 64 bits) is stored as JSON text in a string column, and written lines embed
it again as JSON. A key that a line lacks is null. The last value of a duplicate key counts. NaN and Infinity are
numbers, as Python writes them.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import zstandard

from batchinfer.errors import InputError, InvalidInput, format_value
from batchinfer.io import requests
from batchinfer.io.inputs import (
    MAX_LINE_BYTES,
    Format,
    IndexEntry,
    InputFile,
    InputLine,
    RowBatch,
    RowSpan,
    table_of,
)
from batchinfer.io.json_text import parse_exact, parse_lenient, to_text
from batchinfer.io.lines import read_lines
from batchinfer.io.packed import compression_of
from batchinfer.io.source import WHOLE, Source
from batchinfer.io.unify import Column, FileScan

INDEX_ROWS = 4096
_MAX_COLUMNS = 10_000
_MAX_SHAPES = 4096
_INT64 = 1 << 63
_EXACT = 1 << 53

_KINDS: dict[type, str] = {str: "string", int: "int", float: "double", bool: "bool", list: "nested", dict: "nested"}


def parse(raw: bytes | None) -> dict[str, Any]:
    """Return the object on a line. Raises InvalidInput with the reason."""
    if raw is None:
        raise InvalidInput(f"row is longer than {MAX_LINE_BYTES >> 20} MB")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            value = parse_lenient(raw)
        except ValueError:
            line = f"line {error.lineno} of it, " if error.lineno > 1 else ""
            raise InvalidInput(f"malformed JSON: {error.msg} at {line}column {error.colno}") from None
    if type(value) is not dict:
        raise InvalidInput(f"a row must be a JSON object, this one is {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a string" if isinstance(value, str) else format_value(value)


class _Types:
    """Kinds of values of each key, with the line on which each kind was first seen.

    Most rows have one of a few shapes (keys and value types); each shape is analysed once.
    """

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, int]] = {}
        self._shapes: dict[tuple[Any, ...], tuple[str, ...]] = {}

    def add(self, row: dict[str, Any], line: InputLine) -> None:
        shape = (*row, *map(type, row.values()))
        numbers = self._shapes.get(shape)
        if numbers is None:
            numbers = self._add_shape(row, line.number)
            if len(self._shapes) < _MAX_SHAPES:
                self._shapes[shape] = numbers
        for name in numbers:
            value = row[name]
            if not -_EXACT <= value <= _EXACT:
                self._add_large(name, value, line)

    def _add_shape(self, row: dict[str, Any], line: int) -> tuple[str, ...]:
        for name, value in row.items():
            kinds = self.seen.setdefault(name, {})
            if value is not None:
                kinds.setdefault(_KINDS[type(value)], line)
        return tuple(name for name, value in row.items() if type(value) in (int, float))

    def _add_large(self, name: str, value: float, line: InputLine) -> None:
        if abs(value) >= _INT64 and type(value) is float:
            value = parse_exact(line.raw, name, value)
        if type(value) is int:
            kind = "wide" if -_INT64 <= value < _INT64 else "huge"
            self.seen[name].setdefault(kind, line.number)


def scan(
    source: Source,
    form: Format,
    limit: int | None = None,
    note_ids: Callable[[list[str], list[int]], None] | None = None,
) -> FileScan:
    """Read every line (or the first `limit` rows) once; pass the ids of requests and their ordinals to `note_ids`.

    Raises InputError if no line of a file is an object.
    """
    seekable = compression_of(source) is None
    types = _Types()
    index: list[IndexEntry] = []
    rows = good = 0
    first_error = ""
    whole = hashlib.sha256() if source.local and limit is None else None
    for lines in read_lines(source, seen=None if whole is None else whole.update):
        ids: list[str] = []
        places: list[int] = []
        for line in lines[: None if limit is None else limit - rows]:
            if seekable and rows and rows % INDEX_ROWS == 0:
                index.append(IndexEntry(rows, line.offset, line.number))
            rows += 1
            try:
                row = parse(line.raw)
                types.add(row, line)
            except InvalidInput as error:
                first_error = first_error or f"line {line.place}: {error}"
                continue
            good += 1
            if note_ids is not None and requests.has_id(row):
                ids.append(row["custom_id"])
                places.append(line.ordinal)
        if note_ids is not None:
            note_ids(ids, places)
        if rows == limit:
            break
        if len(types.seen) > _MAX_COLUMNS:
            raise InputError(f"{source.url}: more than {_MAX_COLUMNS} different keys: the file is not a table")
    content = source.content() if whole is None else WHOLE + whole.hexdigest()
    source.check(source.opened._replace(content=content), "changed while it was read")
    if rows and not good:
        raise InputError(f"{source.url}: no row is a JSON object; {first_error}")
    columns = _batch_columns(source.url) if form == "openai-batch" else _columns(source.url, types)
    size, mark, _ = source.opened
    return FileScan(InputFile(source.url, form, size, content, rows, tuple(index), mark), columns)


def _batch_columns(url: str) -> tuple[Column, ...]:
    kinds = {name: frozenset({"nested" if name == "body" else "string"}) for name in requests.COLUMNS}
    return tuple(Column.of_lines(name, url, kinds[name]) for name in requests.COLUMNS)


def _columns(url: str, types: _Types) -> tuple[Column, ...]:
    return tuple(
        Column.of_lines(name, f"{url}:{next(iter(kinds.values()), 1)}", kinds) for name, kinds in types.seen.items()
    )


def read(
    source: Source, file: InputFile, schema: pa.Schema, text_json: Collection[str], spans: Iterable[RowSpan]
) -> Iterator[tuple[RowSpan, RowBatch]]:
    """Yield the rows of ascending spans; seek by the index if the file has one, else skip lines unparsed."""
    cursor = _Cursor(source, file)
    batch, twice = file.format == "openai-batch", dict(file.repeated)
    for span in spans:
        lines = cursor.take_lines(span.start, span.count)
        rows: list[dict[str, Any]] = []
        rows_read = RowBatch(pa.table({}))
        for offset, line in enumerate(lines):
            row, problem = _request(line, twice) if batch else _row(line)
            rows.append(row)
            if problem:
                rows_read.errors[offset] = InvalidInput(f"{source.url}:{line.place}: {problem}")
        texts = {name: _texts(name, rows, lines, source.url, rows_read) for name in schema.names if name in text_json}
        rows_read.table = _table(source.url, schema, rows, texts)
        yield span, rows_read


class _Cursor:
    """Forward-only cursor over the rows of a file of lines."""

    def __init__(self, source: Source, file: InputFile) -> None:
        self._source = source
        self._index = file.index
        self._row = 0
        self._lines: list[InputLine] = []
        self._blocks = read_lines(source)

    def take_lines(self, start: int, count: int) -> list[InputLine]:
        self._seek(start)
        taken: list[InputLine] = []
        while len(taken) < count:
            taken += self._next(count - len(taken))
        return taken

    def _seek(self, start: int) -> None:
        nearest = max((entry for entry in self._index if entry.row <= start), default=None)
        if nearest is not None and nearest.row > self._row + len(self._lines):
            self._row, self._lines = nearest.row, []
            self._blocks = read_lines(self._source, nearest)
        while self._row < start:
            self._next(start - self._row)

    def _next(self, most: int) -> list[InputLine]:
        while not self._lines:
            lines = next(self._blocks, None)
            if lines is None:
                raise InputError(f"{self._source.url}: changed while it was read: it now ends after {self._row} rows")
            self._lines = lines
        taken, self._lines = self._lines[:most], self._lines[most:]
        self._row += len(taken)
        return taken


def _row(line: InputLine) -> tuple[dict[str, Any], str]:
    """Return a line's object, or an empty one and the reason."""
    try:
        return parse(line.raw), ""
    except InvalidInput as error:
        return {}, str(error)


def _request(line: InputLine, twice: dict[int, int]) -> tuple[dict[str, Any], str]:
    """Return a line's request and an empty reason; for an invalid request, its id as text and the reason."""
    row, problem = _row(line)
    try:
        if not problem:
            requests.check_request(row, line, twice.get(line.ordinal))
        return row, problem
    except InvalidInput as error:
        identity = row.get("custom_id")
        text = identity is None or isinstance(identity, str)
        return {"custom_id": identity if text else to_text(identity, "custom_id", line.raw or b"")}, str(error)


def _texts(
    name: str, rows: list[dict[str, Any]], lines: list[InputLine], url: str, batch: RowBatch
) -> list[str | None]:
    """Return the JSON texts of a column's values. Values without one are recorded as errors of `batch`."""
    texts: list[str | None] = []
    for offset, (row, line) in enumerate(zip(rows, lines, strict=True)):
        value, text = row.get(name), None
        try:
            if value is not None:
                text = to_text(value, name, line.raw or b"")
        except InvalidInput as error:
            batch.add(offset, name, InvalidInput(f"{url}:{line.place}: {error}"))
        texts.append(text)
    return texts


def _table(url: str, schema: pa.Schema, rows: list[dict[str, Any]], texts: dict[str, list[str | None]]) -> pa.Table:
    columns, fields = [], []
    for field in schema:
        name = field.name
        values = texts[name] if name in texts else [row.get(name) for row in rows]
        fields.append(field.with_type(pa.string()) if name in texts else field)
        try:
            columns.append(pa.array(values, fields[-1].type))
        except (pa.ArrowException, OverflowError, TypeError) as error:
            # the scan checked every value: another type means that the file has changed
            raise InputError(f"{url}: changed while it was read: column {name!r}: {error}") from error
    return table_of(columns, pa.schema(fields, metadata=schema.metadata), len(rows))


def write(path: Path, rows: Iterator[dict[str, Any]], compression: str | None) -> None:
    """Write one JSON object per line. Compressed bytes contain no time and no name, so equal rows give equal bytes."""
    with _compressor(path, compression) as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


@contextmanager
def _compressor(path: Path, compression: str | None) -> Iterator[Any]:
    with path.open("wb") as file:
        if compression == "gzip":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed:
                yield packed
        elif compression == "zstd":
            with zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(file, closefd=False) as packed:
                yield packed
        else:
            yield file
