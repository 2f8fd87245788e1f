"""Rows in and out, in bounded memory.

`scan_inputs` plans the input, `stream_rows` reads it, `write_rows` writes one part.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from batchinfer.errors import InputError, SpecError, SpoolError
from batchinfer.io import jsonl, parquet
from batchinfer.io.cells import cells_of, fragments_of, json_cells_of, json_line_cells_of, line_cells_of
from batchinfer.io.discover import FoundFile, find_files
from batchinfer.io.inputs import IndexEntry, InputFile, Inputs, RowBatch, RowSpan
from batchinfer.io.partitions import add_partition_columns, add_partition_fields, own_schema, partition_values
from batchinfer.io.seen_ids import SeenIds, repeated_lines
from batchinfer.io.source import Source, Sources
from batchinfer.io.unify import FileScan, unify
from batchinfer.spec import InputSpec, StorageSpec

T = TypeVar("T")

__all__ = [
    "IndexEntry",
    "InputFile",
    "Inputs",
    "RowBatch",
    "RowSpan",
    "rows_of",
    "scan_inputs",
    "stream_rows",
    "write_rows",
]

_SCAN_THREADS = 8
_WRITE_ROWS = 1000


def scan_inputs(spec: InputSpec, storage: StorageSpec, used: frozenset[str] = frozenset()) -> Inputs:
    """Find the files, count their rows and unify their schemas.

    `used` are the columns that prompts need: files must agree in these and in those that are carried, no others.
    Parquet files are planned from their footers; lines are read once from end to end, unless a limit without a filter
    needs fewer. A file without rows is valid. Raises the errors of `find_files`, and InputError (schema drift, damaged
    files).
    """
    sources = Sources(storage)
    files = list(enumerate(find_files(spec, sources)))
    with contextlib.closing(SeenIds()) as seen:
        if spec.limit is not None and spec.where is None:
            scans = list(_first_rows(sources, files, spec.limit, seen))
        else:
            with ThreadPoolExecutor(_SCAN_THREADS) as pool:
                scans = list(pool.map(lambda file: _scan_file(sources, file[0], file[1], seen), files))
        twice = repeated_lines(seen, [scan.file.url for scan in scans])
    scans = [replace(scan, file=replace(scan.file, repeated=lines)) for scan, lines in zip(scans, twice, strict=True)]
    return add_partition_fields(unify(scans, used, spec.columns))


def _first_rows(sources: Sources, files: list[tuple[int, FoundFile]], limit: int, seen: SeenIds) -> Iterator[FileScan]:
    for number, file in files:
        file_scan = _scan_file(sources, number, file, seen, limit)
        yield file_scan
        limit -= file_scan.file.rows
        if not limit:
            return


def _scan_file(sources: Sources, number: int, file: FoundFile, seen: SeenIds, limit: int | None = None) -> FileScan:
    with sources.open(file.url) as source:
        if file.format == "parquet":
            scanned = parquet.scan(source, limit)
        else:
            note_ids = partial(seen.add, number) if file.format == "openai-batch" else None
            scanned = jsonl.scan(source, file.format, limit, note_ids)
    return replace(scanned, file=replace(scanned.file, partitions=partition_values(file.path)))


def stream_rows(
    inputs: Inputs, spans: Iterable[RowSpan], storage: StorageSpec, read_ahead: int = 2
) -> Iterator[tuple[RowSpan, RowBatch]]:
    """Yield the rows of spans, in the order given: files in any order, spans of one file ascending, gaps allowed.

    A thread reads ahead by up to `read_ahead` spans and consumes `spans` lazily; memory holds that many, the span last
    yielded and the one being read. Closing the iterator stops the thread. Raises InputError for a file that changed
    since `scan_inputs`, before or after its rows are read.
    """
    return _read_ahead(_read(inputs, spans, Sources(storage)), read_ahead)


def _read(inputs: Inputs, spans: Iterable[RowSpan], sources: Sources) -> Iterator[tuple[RowSpan, RowBatch]]:
    for number, group in itertools.groupby(spans, key=lambda span: span.file):
        file = inputs.files[number]
        with sources.open(file.url) as source:
            source.check(file.stat, "changed since the job was planned", source.opened)
            yield from _read_file(source, file, inputs, group)


def _read_file(
    source: Source, file: InputFile, inputs: Inputs, spans: Iterable[RowSpan]
) -> Iterator[tuple[RowSpan, RowBatch]]:
    changed = (file.stat, "changed while it was read")
    own = own_schema(file, inputs.schema)
    try:
        if file.format == "parquet":
            batches = parquet.read(source, own, inputs.text_json, spans)
        else:
            batches = jsonl.read(source, file, own, inputs.text_json, spans)
        if file.partitions:
            batches = ((span, add_partition_columns(batch, file, inputs.schema)) for span, batch in batches)
        yield from batches
    except InputError:
        source.check(*changed)  # a changed file is the better explanation
        raise
    source.check(*changed)


class _End:
    """Last item of the reading thread: the error that ended it, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    ready: queue.Queue[T | _End] = queue.Queue(max(depth, 1))
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        placed = False
        while not placed and not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                placed = True

    def pump() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    break
        except BaseException as caught:
            error = caught
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        put(_End(error))

    thread = threading.Thread(target=pump, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        # a hanging request must not delay a drain: the daemon thread ends with the process
        thread.join(timeout=1.0)


def rows_of(table: pa.Table, columns: Iterable[str], text_json: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the rows as Python values (`io.cells`), with JSON text parsed."""
    return _rows(table, {name: json_cells_of if name in text_json else cells_of for name in columns})


def _rows(table: pa.Table, convert: Mapping[str, Callable[[Any], list[Any]]]) -> list[dict[str, Any]]:
    if not convert:
        return [{} for _ in range(table.num_rows)]
    values = [cells(table.column(name)) for name, cells in convert.items()]
    return [dict(zip(convert, row, strict=True)) for row in zip(*values, strict=True)]


def write_rows(
    path: Path,
    table: pa.Table,
    form: str,
    compression: str | None,
    text_json: Collection[str] = (),
    own_json: Collection[str] = (),
) -> None:
    """Write a part to local disk. Equal tables give equal bytes.

    `own_json`: columns of JSON text that needs no validation.

    Lines carry JSON text as JSON, bytes in base64, times as ISO 8601, decimal numbers as text and, since JSON lacks
    them, NaN and infinity as null. Raises SpoolError if the file cannot be written, and then leaves none.
    """
    try:
        if form == "parquet":
            parquet.write(path, table, compression)
        elif compression == "snappy":
            raise SpecError("snappy goes with parquet; lines take zstd, gzip or none", key="output.compression")
        else:
            jsonl.write(path, _lines(table, text_json, own_json), compression)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SpoolError(f"{path}: cannot be written: {error.strerror or error}") from error


def _lines(table: pa.Table, text_json: Collection[str], own_json: Collection[str]) -> Iterator[dict[str, Any]]:
    convert = {name: json_line_cells_of if name in text_json else line_cells_of for name in table.column_names}
    convert |= {name: fragments_of for name in own_json if name in convert}
    for start in range(0, table.num_rows, _WRITE_ROWS):
        yield from _rows(table.slice(start, _WRITE_ROWS), convert)
