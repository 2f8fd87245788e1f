"""Parquet files: schema, rows by range in bounded memory, and writing with equal bytes for equal tables.

Writers commonly make one row group of a million rows. Memory stays bounded because column chunks are read through a
small buffer (`buffer_size`, no `pre_buffer`) and decoded some rows at a time: 86 MB peak for 2,000,000 rows in one row
group, 436 MB without the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import BatchInferError, InputError, InvalidInput, RowError
from batchinfer.io.inputs import Column, FileScan, InputFile, RowBatch, Span, table_of
from batchinfer.io.source import Source

_BUFFER_BYTES = 256 << 10
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
_ROW_GROUP_ROWS = 65536


def scan(source: Source, limit: int | None = None) -> FileScan:
    """Rows (at most `limit`) and columns from the footer. Raises InputError for what is not a Parquet file."""
    with _open(source) as parquet:
        schema: pa.Schema = parquet.schema_arrow
        rows = int(parquet.metadata.num_rows)
    seen = source.opened._replace(content=source.content())
    source.check(seen, "changed while it was read")
    rows = rows if limit is None else min(rows, limit)
    names = schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise InputError(f"{source.url}: {f'column {twice[0]!r} is there twice' if twice else 'has no columns'}")
    # nullable, since a cell that cannot be read becomes null
    columns = tuple(Column(field.with_nullable(True), source.url) for field in schema)
    file = InputFile(source.url, "parquet", seen.size, seen.content, rows, mark=seen.mark)
    return FileScan(file, columns, schema.metadata)


def read(source: Source, schema: pa.Schema, spans: Iterable[Span]) -> Iterator[tuple[Span, RowBatch]]:
    """The rows of ascending spans, with the columns of `schema`, which fetches no others.

    Row groups before a span are skipped unread. (Files on object storage are fetched in blocks of 1 MB, so columns
    that share a block come along.)
    """
    with _open(source) as parquet:
        rows = _Rows(parquet, schema.names)
        for span in spans:
            try:
                batches = rows.take(span.start, span.count)
            except BatchInferError:
                raise
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                place = f"{source.url}: rows {span.start} to {span.start + span.count - 1}"
                raise InputError(f"{place} cannot be read: {error}") from error
            yield span, _checked(pa.Table.from_batches(batches), schema, source.url, span.start)


def _open(source: Source) -> Any:
    file = source.arrow()
    try:
        # INT96, which holds no type of its own: in nanoseconds, Arrow's default, 9999-12-31 would overflow
        return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, coerce_int96_timestamp_unit="us")
    except BatchInferError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source.url}: not a readable Parquet file: {error}") from error


class _Rows:
    """A cursor over a file's rows that only moves forward."""

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

    def take(self, start: int, count: int) -> list[pa.RecordBatch]:
        self._skip_to(start)
        taken = []
        while count:
            batch = self._next(count)
            taken.append(batch)
            count -= batch.num_rows
        return taken

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
            raise pa.ArrowInvalid("the file holds fewer rows than it says")
        self._rest = batch.slice(most) if batch.num_rows > most else None
        batch = batch.slice(0, most)
        self._position += batch.num_rows
        return batch


def _checked(table: pa.Table, schema: pa.Schema, url: str, start: int) -> RowBatch:
    """With the job's schema. A string that is not UTF-8 becomes null and its row an error."""
    errors: dict[int, RowError] = {}
    columns = []
    for field in schema:
        column = table.column(field.name)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column, bad = _without_bad_cells(column)
            for offset in bad:
                errors[offset] = InvalidInput(f"{url}: row {start + offset}: column {field.name!r} is not valid UTF-8")
        columns.append(column if column.type == field.type else column.cast(field.type))
    return RowBatch(table_of(columns, schema, table.num_rows), errors)


def _without_bad_cells(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[int]]:
    """The column with null for each cell that does not validate, and where they are."""
    kept: list[int | None] = list(range(len(column)))
    bad = []
    for offset in range(len(column)):
        try:
            column.slice(offset, 1).validate(full=True)
        except pa.ArrowInvalid:
            kept[offset] = None
            bad.append(offset)
    return column.take(pa.array(kept, pa.int64())), bad


def write(path: Path, table: pa.Table, compression: str | None) -> None:
    """Equal tables give equal bytes, however they are cut into chunks in memory."""
    settings = {"version": "2.6", "row_group_size": _ROW_GROUP_ROWS, "write_statistics": True, "use_dictionary": True}
    pq.write_table(_canonical(table), path, compression=compression or "zstd", store_schema=True, **settings)


def _canonical(table: pa.Table) -> pa.Table:
    """One chunk per column; dictionaries in the order in which values first appear."""
    for position, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = table.column(position).cast(field.type.value_type)
            table = table.set_column(position, field, plain.dictionary_encode().cast(field.type))
    return table.combine_chunks()
