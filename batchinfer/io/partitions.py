"""Hive-style partition columns: `data/lang=de/part-0.parquet` has `lang`, as Hive, Spark, DuckDB and pyarrow write it.

Every folder `key=value` of a path, as given or found, counts; the innermost of a repeated key. A file's own column
takes precedence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote

import pyarrow as pa

from batchinfer.io.inputs import InputFile, Inputs, RowBatch, table_of
from batchinfer.log import log

Values = tuple[tuple[str, str | None], ...]  # key → its text, None for null

_NULLS = ("", "__HIVE_DEFAULT_PARTITION__")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = range(-(1 << 63), 1 << 63)


def partition_values(path: str) -> Values:
    """Return the keys and values of a path's folders, percent-decoded."""
    pairs = [part.split("=", 1) for part in path.split("/")[:-1] if "=" in part.lstrip("=")]
    named = {unquote(key): None if value in _NULLS else unquote(value) for key, value in pairs if key}
    return tuple(named.items())


def add_partition_fields(inputs: Inputs) -> Inputs:
    """Return the inputs with a column for every key: of integers if all its values are integers, else of text."""
    own = set(inputs.schema.names)
    keys = list(dict.fromkeys(key for file in inputs.files for key, _ in file.partitions))
    hidden = [key for key in keys if key in own]
    if hidden:
        log.warning("the files have the column themselves: the values of their folders are ignored", columns=hidden)
    keys = [key for key in keys if key not in own]
    partitions = [dict(file.partitions) for file in inputs.files]
    lacking = [
        file.url for file, values in zip(inputs.files, partitions, strict=True) if not values.keys() >= set(keys)
    ]
    if lacking:
        log.warning("files are in no folder that names these columns: they are null", columns=keys, first=lacking[0])
    fields = [pa.field(key, _type([values.get(key) for values in partitions])) for key in keys]
    files = tuple(
        replace(file, partitions=tuple((key, values.get(key)) for key in keys))
        for file, values in zip(inputs.files, partitions, strict=True)
    )
    schema = pa.schema([*inputs.schema, *fields], metadata=inputs.schema.metadata)
    return replace(inputs, files=files, schema=schema)


def partitions_match(file: InputFile, found: Values, schema: pa.Schema) -> bool:
    """Return True if the partitions `found` now match those planned for the file."""
    named, planned = dict(found), dict(file.partitions)
    own = set(schema.names) - planned.keys()
    return named.keys() <= own | planned.keys() and all(named.get(key) == value for key, value in file.partitions)


def own_schema(file: InputFile, schema: pa.Schema) -> pa.Schema:
    """Return the schema of the columns in the file itself."""
    keys = dict(file.partitions)
    return pa.schema([field for field in schema if field.name not in keys], metadata=schema.metadata)


def add_partition_columns(batch: RowBatch, file: InputFile, schema: pa.Schema) -> RowBatch:
    """Return the batch of a file's own columns with all columns of the schema."""
    keys, table, rows = dict(file.partitions), batch.table, batch.table.num_rows
    columns = [
        pa.repeat(_scalar(keys[field.name], field.type), rows) if field.name in keys else table.column(field.name)
        for field in schema
    ]
    fields = [field if field.name in keys else table.schema.field(field.name) for field in schema]
    return replace(batch, table=table_of(columns, pa.schema(fields, metadata=schema.metadata), rows))


def _type(values: Sequence[str | None]) -> pa.DataType:
    present = [value for value in values if value is not None]
    whole = all(_INTEGER.fullmatch(value) and int(value) in _INT64 for value in present)
    return pa.int64() if present and whole else pa.string()


def _scalar(value: str | None, kind: pa.DataType) -> pa.Scalar:
    return pa.scalar(int(value) if value is not None and pa.types.is_integer(kind) else value, kind)
