"""Helpers for tests of reading: write files, scan and stream them."""

import gzip
import json

import pyarrow.parquet as pq
import zstandard

from batchinfer.io.rows import RowSpan, rows_of, scan_inputs, stream_rows
from batchinfer.spec import InputSpec, StorageSpec

LOCAL = StorageSpec()


def write_lines(path, rows, end="\n"):
    """Write rows: values, or bytes for a raw line. The name decides about compression."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    data = b"".join(line + end.encode() for line in lines)
    path.write_bytes(compress(path.name, data))
    return str(path)


def compress(name, data):
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data) if name.endswith(".zst") else data


def write_parquet(path, table, **settings):
    pq.write_table(table, path, **settings)
    return str(path)


def scan_all(*paths, storage=LOCAL, **settings):
    return scan_inputs(InputSpec(path=tuple(str(path) for path in paths), **settings), storage)


def spans_of(inputs, step=1000):
    for number, file in enumerate(inputs.files):
        for start in range(0, file.rows, step):
            yield RowSpan(number, start, min(step, file.rows - start))


def read_all(inputs, spans=None, storage=LOCAL):
    """Return (rows as Python values, {position: error text}) of all spans."""
    rows, errors = [], {}
    for span, batch in stream_rows(inputs, spans_of(inputs) if spans is None else spans, storage):
        assert batch.table.num_rows == span.count
        assert batch.table.schema.names == inputs.schema.names
        errors |= {len(rows) + offset: str(error) for offset, error in batch.errors.items()}
        rows += rows_of(batch.table, inputs.schema.names, inputs.text_json)
    return rows, errors
