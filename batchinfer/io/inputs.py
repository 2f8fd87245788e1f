"""Value types of the input: its files, its rows, and their common schema."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from batchinfer.errors import RowError, SpecError, suggest
from batchinfer.io.source import Stat

Format = Literal["parquet", "jsonl", "openai-batch"]
MAX_LINE_BYTES = 64 << 20


class IndexEntry(NamedTuple):
    """Seek point in a file of lines: row `row` begins at byte `offset`, on line `line` (counted from 1)."""

    row: int
    offset: int
    line: int


class InputLine(NamedTuple):
    """A line that is not blank, or an element of a JSON array.

    number: the line, from 1, on which it begins. offset: its byte offset. raw: its content, None above MAX_LINE_BYTES.
    element: its index in the array.
    """

    number: int
    offset: int
    raw: bytes | None
    element: int | None = None

    @property
    def place(self) -> str:
        return f"{self.number}" if self.element is None else f"{self.number}, element [{self.element}]"

    @property
    def ordinal(self) -> int:
        """Return a number that is unique within the file."""
        return self.number if self.element is None else self.element


@dataclass(frozen=True)
class InputFile:
    """One file as it was when the job was planned. `rows` is the number of rows, from the first, that the job covers.

    `content` identifies the file wherever it is stored and whatever its name; `mark` makes rehashing unnecessary (see
    `Stat`). `index` has an entry for every few thousand rows of an uncompressed file of lines, and is empty for others.
    `known_as`: its URL when the job was planned, if different. `partitions`: columns named by its folders. `repeated`:
    pairs of a line's ordinal and the ordinal of the earlier line with the same `custom_id`.
    """

    url: str
    format: Format
    size: int
    content: str
    rows: int
    index: tuple[IndexEntry, ...] = ()
    mark: str = ""
    known_as: str | None = None
    partitions: tuple[tuple[str, str | None], ...] = ()
    repeated: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """Return the file's name in the output, which is the same on every machine."""
        return self.known_as or self.url

    @property
    def stat(self) -> Stat:
        return Stat(self.size, self.mark, self.content)

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("url", "format", "size", "content", "mark", "rows")}
        if self.partitions:
            values["partitions"] = dict(self.partitions)
        if self.repeated:
            values["repeated"] = [list(lines) for lines in self.repeated]
        return {**values, "index": [list(entry) for entry in self.index]} if self.index else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputFile:
        index = tuple(IndexEntry(*entry) for entry in values.get("index", ()))
        partitions = tuple(values.get("partitions", {}).items())
        repeated = tuple((line, first) for line, first in values.get("repeated", ()))
        return cls(**{**values, "index": index, "partitions": partitions, "repeated": repeated})


@dataclass(frozen=True)
class Inputs:
    """All files, and the schema of their rows in a Parquet part.

    Rows keep the types of their own file (`io.types`). `text_json`: columns whose cells are read as the text of a JSON
    value.
    """

    files: tuple[InputFile, ...]
    schema: pa.Schema
    text_json: frozenset[str] = frozenset()

    def select(self, columns: Iterable[str]) -> Inputs:
        """Return the same rows with only these columns, in the schema's order; `stream` then reads no others.

        Raises SpecError for a column that does not exist.
        """
        selected = set(columns)
        for name in sorted(selected - set(self.schema.names)):
            known = ", ".join(self.schema.names)
            raise SpecError(f"column {name!r} is not in the input{suggest(name, self.schema.names)} (it has: {known})")
        fields = [field for field in self.schema if field.name in selected]
        schema = pa.schema(fields, metadata=self.schema.metadata)
        return replace(self, schema=schema, text_json=self.text_json & selected)

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": [file.to_dict() for file in self.files],
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "text_json": sorted(self.text_json),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Inputs:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"])))
        files = tuple(InputFile.from_dict(file) for file in values["files"])
        return cls(files, schema, frozenset(values["text_json"]))


@dataclass(frozen=True)
class RowSpan:
    """Rows `start` to `start + count - 1` of `files[file]`."""

    file: int
    start: int
    count: int


@dataclass
class RowBatch:
    """The rows of a span in order, and its read errors.

    `errors`: offset within the span → error of a row that could not be read; its cells are null. `damaged`: offset →
    unreadable columns, for rows whose other cells could be read.
    """

    table: pa.Table
    errors: dict[int, RowError] = field(default_factory=dict)
    damaged: dict[int, set[str]] = field(default_factory=dict)

    def add(self, offset: int, column: str, error: RowError) -> None:
        """Record a cell that could not be read."""
        if offset not in self.errors or offset in self.damaged:
            self.errors.setdefault(offset, error)
            self.damaged.setdefault(offset, set()).add(column)

    def without(self, columns: frozenset[str]) -> set[int]:
        """Return the offsets of rows in which one of these columns could not be read."""
        return {offset for offset in self.errors if offset not in self.damaged or self.damaged[offset] & columns}


def table_of(columns: list[Any], schema: pa.Schema, rows: int) -> pa.Table:
    """Return a table that keeps its number of rows even without any column."""
    if columns:
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.table({"": pa.nulls(rows)}).select([])  # replacing the schema's metadata would reset the number of rows
