"""What the input is: its files, its rows, and the one schema that they share."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from batchinfer.errors import InputError, RowError, SpecError, suggest
from batchinfer.io.source import Stat
from batchinfer.log import log

Format = Literal["parquet", "jsonl", "openai-batch"]


class IndexEntry(NamedTuple):
    """Row `row` of a file of lines begins at byte `offset`, on line `line` (counted from 1)."""

    row: int
    offset: int
    line: int


@dataclass(frozen=True)
class InputFile:
    """One file as it was when the job was planned. `rows` is how many of its rows, from the first, the job covers.

    `content` says which file it is, wherever it lies and whatever its name; `mark` spares looking at it again (see
    `Stat`). `index` has an entry for every few thousand rows of an uncompressed file of lines, and is empty for others.
    `known_as`: its URL when the job was planned, if that was another one. `partitions`: columns that its folders name.
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

    @property
    def name(self) -> str:
        """What the output calls it, on whichever machine it is read."""
        return self.known_as or self.url

    @property
    def stat(self) -> Stat:
        return Stat(self.size, self.mark, self.content)

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("url", "format", "size", "content", "mark", "rows")}
        if self.partitions:
            values["partitions"] = dict(self.partitions)
        return {**values, "index": [list(entry) for entry in self.index]} if self.index else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputFile:
        index = tuple(IndexEntry(*entry) for entry in values.get("index", ()))
        partitions = tuple(values.get("partitions", {}).items())
        return cls(**{**values, "index": index, "partitions": partitions})


@dataclass(frozen=True)
class Inputs:
    """All files and the schema of their rows. `text_json`: string columns that carry JSON values as text."""

    files: tuple[InputFile, ...]
    schema: pa.Schema
    text_json: frozenset[str] = frozenset()

    def select(self, columns: Iterable[str]) -> Inputs:
        """The same rows with only these columns, in the schema's order; `stream` then reads no others.

        Raises SpecError for a column that is not there.
        """
        wanted = set(columns)
        for name in sorted(wanted - set(self.schema.names)):
            known = ", ".join(self.schema.names)
            raise SpecError(f"column {name!r} is not in the input{suggest(name, self.schema.names)} (it has: {known})")
        kept = [column for column in self.schema if column.name in wanted]
        schema = pa.schema(kept, metadata=self.schema.metadata)
        return replace(self, schema=schema, text_json=self.text_json & wanted)

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
class Span:
    """Rows `start` to `start + count - 1` of `files[file]`."""

    file: int
    start: int
    count: int


@dataclass
class RowBatch:
    """The rows of a span in order, and by offset within it the rows that could not be read (their cells are null)."""

    table: pa.Table
    errors: dict[int, RowError] = field(default_factory=dict)


def table_of(columns: list[Any], schema: pa.Schema, rows: int) -> pa.Table:
    """A table that keeps its number of rows even without any column."""
    if columns:
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.table({"": pa.nulls(rows)}).select([])  # setting the schema's metadata would lose the number again


@dataclass(frozen=True)
class Column:
    """A column as one file has it. `where` is the file, for lines with the line that shows the type.

    For lines: `json` is JSON text, `mixed` says that the file itself has values of several types there, `wide` that it
    has integers that a double cannot hold.
    """

    field: pa.Field
    where: str
    lines: bool = False
    json: bool = False
    mixed: bool = False
    wide: bool = False


@dataclass(frozen=True)
class FileScan:
    """What reading a file's schema showed. A file of lines without any row has no columns."""

    file: InputFile
    columns: tuple[Column, ...]
    metadata: Mapping[bytes, bytes] | None = None

    @property
    def lines(self) -> bool:
        return self.file.format != "parquet"


def unify(scans: Iterable[FileScan]) -> Inputs:
    """All files with one schema.

    A key that no line of a file has is null there, as it is in single lines; a Parquet file must have every column.
    Raises InputError that names two files and the column in which they differ.
    """
    scans = list(scans)
    union: dict[str, Column] = {}
    parquet = next((scan for scan in scans if not scan.lines), None)
    filled = [scan for scan in scans if scan.columns]
    for scan in filled:
        for column in scan.columns:
            name = column.field.name
            union[name] = _merge(union[name], column) if name in union else column
    for scan in filled:
        absent = union.keys() - {column.field.name for column in scan.columns}
        for name in sorted(absent):
            _absent(union[name], scan, parquet)
    schema = pa.schema([column.field for column in union.values()], metadata=parquet.metadata if parquet else None)
    json = frozenset(name for name, column in union.items() if column.json)
    return Inputs(tuple(scan.file for scan in scans), schema, json)


def _absent(column: Column, scan: FileScan, parquet: FileScan | None) -> None:
    name = column.field.name
    if not scan.lines or (parquet is not None and column.where == parquet.file.url):
        raise InputError(f"column {name!r} is in {column.where} but not in {scan.file.url}: all files need it")
    log.warning("no line of this file has the column: it is null there", column=name, file=scan.file.url)


def _merge(first: Column, second: Column) -> Column:
    """The column that holds both. The earlier one gives name, place and metadata."""
    a, b = first.field.type, second.field.type
    if (a == b and first.json == second.json) or (first.json and pa.types.is_null(b)):
        return replace(first, mixed=first.mixed or second.mixed, wide=first.wide or second.wide)
    if pa.types.is_null(a):
        return second
    if pa.types.is_null(b) or {a, b} in _SAME_VALUES:
        return first
    if first.lines and second.lines:
        if {a, b} == {pa.int64(), pa.float64()}:
            if not (first.wide or second.wide):
                return replace(first, field=first.field.with_type(pa.float64()))
            return replace(first, field=first.field.with_type(pa.string()), json=True, mixed=True)
        if first.mixed or second.mixed:
            return replace(first, field=first.field.with_type(pa.string()), json=True, mixed=True)
    raise InputError(
        f"column {first.field.name!r} is {_kind(first)} in {first.where} but {_kind(second)} in {second.where}: "
        "all files need the same type"
    )


_SAME_VALUES = ({pa.string(), pa.large_string()}, {pa.binary(), pa.large_binary()})


def _kind(column: Column) -> str:
    return "a nested value" if column.json else str(column.field.type)
