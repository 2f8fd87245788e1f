"""Parquet files: schema, rows by range in bounded memory, and deterministic writing.

Writers commonly write one row group of a million rows. Memory stays bounded because column chunks are read through a
small buffer (`buffer_size`, no `pre_buffer`) and decoded some rows at a time: 86 MB peak for 2,000,000 rows in one row
group, 436 MB without the buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import BatchInferError, InputError, InvalidInput
from batchinfer.io.cells import interval_texts
from batchinfer.io.inputs import InputFile, RowBatch, RowSpan, table_of
from batchinfer.io.json_text import number_texts
from batchinfer.io.source import Source
from batchinfer.io.types import fit_to_type, is_json, part_type, row_type
from batchinfer.io.unify import Column, FileScan

_BUFFER_BYTES = 256 << 10
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
_ROW_GROUP_ROWS = 65536


def scan(source: Source, limit: int | None = None) -> FileScan:
    """Return rows (at most `limit`) and columns from the footer. Raises InputError if the file is not Parquet."""
    with _open(source) as parquet:
        schema: pa.Schema = parquet.schema_arrow
        rows = int(parquet.metadata.num_rows)
        intervals = _intervals(parquet)
    seen = source.opened._replace(content=source.content())
    source.check(seen, "changed while it was read")
    rows = rows if limit is None else min(rows, limit)
    if not schema.names:
        raise InputError(f"{source.url}: has no columns")
    # nullable, because unreadable cells become null
    kinds = [pa.string() if field.name in intervals else part_type(field.type) for field in schema]
    fields = [field.with_type(kind).with_nullable(True) for field, kind in zip(schema, kinds, strict=True)]
    columns = tuple(Column(field, source.url, json=is_json(field.type)) for field in fields)
    file = InputFile(source.url, "parquet", seen.size, seen.content, rows, mark=seen.mark)
    return FileScan(file, columns, schema.metadata)


def read(
    source: Source, schema: pa.Schema, text_json: Collection[str], spans: Iterable[RowSpan]
) -> Iterator[tuple[RowSpan, RowBatch]]:
    """Yield the rows of ascending spans, with only the columns of `schema`, in plain types.

    Row groups before a span are skipped unread. (Files on object storage are fetched in blocks of 1 MB, so columns that
    share a block are fetched too.)
    """
    with contextlib.ExitStack() as stack:
        rows = _ParquetReader(source, schema.names, stack)
        for span in spans:
            try:
                batch = _checked(rows.take_rows(span.start, span.count), schema, text_json, source.url, span.start)
            except BatchInferError:
                raise
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                place = f"{source.url}: rows {span.start} to {span.start + span.count - 1}"
                raise InputError(f"{place} cannot be read: {error}") from error
            yield span, batch


def _open(source: Source, metadata: Any = None) -> Any:
    file = source.arrow()
    try:
        # INT96 timestamps: in nanoseconds, Arrow's default unit, 9999-12-31 would overflow
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False, "coerce_int96_timestamp_unit": "us"}
        return pq.ParquetFile(file, metadata=metadata, **options)
    except BatchInferError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source.url}: not a readable Parquet file: {error}") from error


def _intervals(parquet: Any) -> frozenset[str]:
    """Return the columns of Parquet's type INTERVAL.

    Arrow reads them as 12 bytes and cannot write the type, so they become text.
    """
    columns = map(parquet.schema.column, range(len(parquet.schema)))
    return frozenset(column.path for column in columns if column.converted_type == "INTERVAL")


class _ParquetReader:
    """Reader of a file's columns by ascending ranges of rows, in their plain types.

    Arrow refuses a whole dictionary that holds one damaged text, and nested dictionaries of several row groups at once.
    The columns with dictionaries are then read again without the Arrow type stored in the file, which gives the same
    values as plain text.
    """

    def __init__(self, source: Source, names: list[str], stack: contextlib.ExitStack) -> None:
        self._source = source
        self._stack = stack
        parquet = stack.enter_context(_open(source))
        fields = [parquet.schema_arrow.field(name) for name in names]
        self._intervals = _intervals(parquet).intersection(names)
        self._kinds = {field.name: row_type(field.type) for field in fields} | dict.fromkeys(
            self._intervals, pa.string()
        )
        typed = [field for field in fields if field.name not in self._intervals]
        self._with_dictionaries = [field.name for field in typed if field.type != self._kinds[field.name]]
        self._rows = [_ParquetRows(parquet, names)]

    def take_rows(self, start: int, count: int) -> pa.Table:
        if not count:
            return pa.schema(list(self._kinds.items())).empty_table()
        try:
            tables = [pa.Table.from_batches(rows.take_batches(start, count)) for rows in self._rows]
        except pa.ArrowException:
            if not self._with_dictionaries or len(self._rows) > 1:
                raise
            self._read_dictionaries_as_text()
            return self.take_rows(start, count)
        read = {name: table.column(name) for table in tables for name in table.column_names}
        read |= {name: interval_texts(read[name]) for name in self._intervals}
        columns = [fit_to_type(read[name], kind) for name, kind in self._kinds.items()]
        return table_of(columns, pa.schema(list(self._kinds.items())), count)

    def _read_dictionaries_as_text(self) -> None:
        others = [name for name in self._kinds if name not in self._with_dictionaries]
        typeless = self._stack.enter_context(_open(self._source, _without_arrow_types(self._source)))
        self._rows = [
            _ParquetRows(self._stack.enter_context(_open(self._source)), others),
            _ParquetRows(typeless, self._with_dictionaries),
        ]


def _without_arrow_types(source: Source) -> Any:
    """Return the file's footer with Arrow's own schema hidden. The format: https://parquet.apache.org/docs."""
    end = source.read_at(source.opened.size - 8, 8)
    size = int.from_bytes(end[:4], "little")
    footer = source.read_at(source.opened.size - 8 - size, size).replace(b"ARROW:schema", b"arrow:schema")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + end))


class _ParquetRows:
    """Forward-only cursor over a file's rows."""

    def __init__(self, parquet: Any, columns: list[str]) -> None:
        self._parquet = parquet
        self._columns = columns
        groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
        self._ends: list[int] = []
        for group in groups:
            self._ends.append((self._ends[-1] if self._ends else 0) + group.num_rows)
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=1)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rest: pa.RecordBatch | None = None

    def take_batches(self, start: int, count: int) -> list[pa.RecordBatch]:
        self._skip_to(start)
        batches = []
        while count:
            batch = self._next(count)
            batches.append(batch)
            count -= batch.num_rows
        return batches

    def _skip_to(self, start: int) -> None:
        group = next(i for i, end in enumerate(self._ends) if start < end)
        first = self._ends[group - 1] if group else 0
        if self._batches is None or first > self._position:
            groups = list(range(group, len(self._ends)))
            self._batches = self._parquet.iter_batches(
                batch_size=self._batch_rows, row_groups=groups, columns=self._columns, use_threads=False
            )
            self._position, self._rest = first, None
        while self._position < start:
            self._next(start - self._position)

    def _next(self, most: int) -> pa.RecordBatch:
        assert self._batches is not None
        batch = self._rest if self._rest is not None else next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("the file has fewer rows than its footer declares")
        self._rest = batch.slice(most) if batch.num_rows > most else None
        batch = batch.slice(0, most)
        self._position += batch.num_rows
        return batch


def _checked(table: pa.Table, schema: pa.Schema, text_json: Collection[str], url: str, start: int) -> RowBatch:
    """Validate cells: a damaged cell becomes null and its row an error."""
    batch = RowBatch(table)
    columns, fields = [], []
    for field in schema:
        column = table.column(field.name)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column, bad = _without_bad_cells(column)
            for offset, why in bad.items():
                error = InvalidInput(f"{url}: row {start + offset}: column {field.name!r} {why}")
                batch.add(offset, field.name, error)
        if field.name in text_json and pa.types.is_floating(column.type):
            column = number_texts(column)
        columns.append(column)
        fields.append(field.with_type(column.type))
    batch.table = table_of(columns, pa.schema(fields, metadata=schema.metadata), table.num_rows)
    return batch


def _without_bad_cells(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """Return the column with null for each invalid cell, and the reasons by offset.

    Cells are checked in copies, because a slice of nested values validates everything its column holds.
    """
    bad: dict[int, str] = {}
    spans = [(0, len(column))]
    while spans:
        start, stop = spans.pop()
        try:
            column.take(pa.array(range(start, stop), pa.int64())).validate(full=True)
        except pa.ArrowInvalid as error:
            middle = (start + stop) // 2
            if middle > start:
                spans += [(start, middle), (middle, stop)]
            else:
                bad[start] = "is not valid UTF-8" if "UTF8" in str(error) else f"cannot be read: {error}"
    indices = [None if offset in bad else offset for offset in range(len(column))]
    return column.take(pa.array(indices, pa.int64())), bad


def write(path: Path, table: pa.Table, compression: str | None) -> None:
    """Write a table. Equal tables give equal bytes, however they are chunked in memory."""
    settings = {"version": "2.6", "row_group_size": _ROW_GROUP_ROWS, "write_statistics": True, "use_dictionary": True}
    pq.write_table(_canonical(table), path, compression=compression or "zstd", store_schema=True, **settings)


def _canonical(table: pa.Table) -> pa.Table:
    """Return a table with one chunk per column and dictionaries in the order of first appearance."""
    for position, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(position).cast(field.type.value_type)
            table = table.set_column(position, field, plain.dictionary_encode().cast(field.type))
    return table.combine_chunks()
