"""Parts as a reader of the output sees them: whole files of at most a chunk's rows, Parquet or JSON lines."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from batchinfer.errors import OutputConflict
from batchinfer.io.rows import rows_of


def _unzstd(data: bytes) -> bytes:
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
    return reader.read()


_DECOMPRESS = {".gz": gzip.decompress, ".zst": _unzstd}


def read_part(data: bytes, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a part as Python values; `columns` picks those of its columns that it has.

    Raises OutputConflict for bytes that are no such file.
    """
    try:
        if name.endswith(".parquet"):
            return _parquet_rows(data, columns)
        return _line_rows(data, name, columns)
    except (pa.ArrowException, OSError, EOFError, ValueError, zstandard.ZstdError) as error:
        raise OutputConflict(f"{name}: damaged: {' '.join(str(error).split())}; restore it from a copy") from None


def _parquet_rows(data: bytes, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    file = pq.ParquetFile(io.BytesIO(data))
    names = file.schema_arrow.names
    chosen = names if columns is None else [name for name in columns if name in names]
    return rows_of(file.read(columns=chosen), chosen)


def _line_rows(data: bytes, name: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    for ending, decompress in _DECOMPRESS.items():
        if name.endswith(ending):
            data = decompress(data)
    rows = [orjson.loads(line) for line in data.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    if columns is None:
        return rows
    return [{column: row[column] for column in columns if column in row} for row in rows]
