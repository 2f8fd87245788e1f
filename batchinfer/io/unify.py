"""Schema unification: the columns of all files, and one type for each that holds its values in every file."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.io.inputs import InputFile, Inputs
from batchinfer.io.types import common_type, is_json
from batchinfer.log import log

# kinds of values in lines: `wide` is an integer that a double cannot represent, `huge` one beyond 64 bits
_TYPES = {
    "string": pa.string(),
    "int": pa.int64(),
    "wide": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
}
_NUMBERS = frozenset({"int", "double"})


@dataclass(frozen=True)
class Column:
    """A column of one file. `where` is the file and, for lines, the line that shows the type.

    `json`: its cells are read as JSON text. `kinds`: the kinds of its values in a file of lines.
    """

    field: pa.Field
    where: str
    json: bool = False
    kinds: frozenset[str] | None = None

    @classmethod
    def of_lines(cls, name: str, where: str, kinds: Iterable[str]) -> Column:
        """Return a column with the one type of all values, else JSON text.

        Integers mixed with floats are JSON text with the type float64.
        """
        kinds = frozenset(kinds)
        types = {_TYPES.get(kind) for kind in kinds}
        if kinds == _NUMBERS:
            return cls(pa.field(name, pa.float64()), where, True, kinds)
        kind = types.pop() if len(types) == 1 else None
        return cls(
            pa.field(name, kind or (pa.string() if kinds else pa.null())), where, bool(kinds and not kind), kinds
        )


@dataclass(frozen=True)
class FileScan:
    """Result of reading a file's schema. A file of lines without any row has no columns."""

    file: InputFile
    columns: tuple[Column, ...]
    metadata: Mapping[bytes, bytes] | None = None

    @property
    def lines(self) -> bool:
        return self.file.format != "parquet"

    @functools.cached_property
    def by_name(self) -> dict[str, Column]:
        return {column.field.name: column for column in self.columns}

    @functools.cached_property
    def twice(self) -> frozenset[str]:
        """Return the names that several columns have."""
        if len(self.by_name) == len(self.columns):
            return frozenset()
        names = [column.field.name for column in self.columns]
        return frozenset(name for name in names if names.count(name) > 1)


def unify(
    scans: Iterable[FileScan], used: frozenset[str] = frozenset(), carried: Iterable[str] | None = None
) -> Inputs:
    """Return all files with one schema.

    `used` are the columns that prompts need, `carried` the input columns of the output, None for all. A column that is
    neither used nor carried is dropped if its types conflict. A key that no line of a file has is null there, as in
    single lines; a Parquet file must have every column. Files without rows decide only if all are empty. A column
    without any value has the type null. Raises InputError that names two files and the column in which they differ.
    """
    scans = list(scans)
    decide = [scan for scan in scans if scan.file.rows and scan.columns] or [scan for scan in scans if scan.columns]
    needed = None if carried is None else used.union(carried)
    union: dict[str, Column] = {}
    for name in dict.fromkeys(name for scan in decide for name in scan.by_name):
        try:
            union[name] = _unify_column(name, decide)
        except InputError as error:
            if needed is None and name not in used:
                raise InputError(f"{error}, or leave it out with input.columns") from None
            if needed is None or name in needed:
                raise
    if not decide:
        union = {name: Column(pa.field(name, pa.null()), "") for name in sorted(used.union(carried or ()))}
    metadata = next((scan.metadata for scan in scans if not scan.lines), None)
    schema = pa.schema([column.field for column in union.values()], metadata=metadata)
    json = frozenset(name for name, column in union.items() if column.json)
    for name in union:
        if needed is None or name in needed:
            _warn_of_absence(name, decide)
    return Inputs(tuple(scan.file for scan in scans), schema, json)


def _unify_column(name: str, scans: list[FileScan]) -> Column:
    """Return the column that holds the values of all files. The first file gives place and metadata."""
    merged: Column | None = None
    for scan in scans:
        if name in scan.twice:
            raise InputError(f"{scan.file.url}: column {name!r} exists twice: all files need it once")
        own = scan.by_name.get(name)
        if own is not None:
            merged = _merge(merged, own) if merged else own
    assert merged is not None, "the name comes from one of the scans"
    lacking = next((scan for scan in scans if not scan.lines and name not in scan.by_name), None)
    if lacking is not None:
        raise InputError(f"column {name!r} is in {merged.where} but not in {lacking.file.url}: all files need it")
    return merged


def _warn_of_absence(name: str, scans: list[FileScan]) -> None:
    lacking = [scan.file.url for scan in scans if name not in scan.by_name]
    if lacking:
        log.warning(
            "some files have the column in no line: it is null there", column=name, files=len(lacking), first=lacking[0]
        )


def _merge(first: Column, second: Column) -> Column:
    """Return the column that holds both. Raises InputError."""
    if (first.json, first.kinds, first.field.type) == (second.json, second.kinds, second.field.type):
        return first
    merged: Column | None
    if first.kinds is not None and second.kinds is not None:
        merged = _merge_lines(first, second)
    elif first.kinds is None and second.kinds is None:
        merged = _merge_parquet(first, second)
    else:
        merged = (
            _merge_parquet_and_lines(second, first)
            if first.kinds is not None
            else _merge_parquet_and_lines(first, second)
        )
        merged = merged and replace(merged, field=first.field.with_type(merged.field.type))
    if merged is None:
        raise InputError(
            f"column {first.field.name!r} is {_kind(first)} in {first.where} but {_kind(second)} in {second.where}: "
            "all files need the same type"
        )
    return merged


def _merge_parquet(first: Column, second: Column) -> Column | None:
    kind = common_type(first.field.type, second.field.type)
    if kind is None or (first.json != second.json and pa.types.is_string(kind)):
        return None
    return replace(first, field=first.field.with_type(kind), json=first.json or second.json)


def _merge_lines(first: Column, second: Column) -> Column | None:
    """Merge two columns of lines: numbers combine with numbers, and a column of mixed kinds with everything."""
    kinds = [column.kinds for column in (first, second) if column.kinds]
    families = {_family(each) for each in kinds}
    if len(families) > 1 and "mixed" not in families:
        return None
    shown = first if first.kinds else second
    return Column.of_lines(first.field.name, shown.where, frozenset().union(*kinds))


def _family(kinds: frozenset[str]) -> str:
    if kinds <= {*_NUMBERS, "wide"}:
        return "numbers"
    return next(iter(kinds)) if len(kinds) == 1 and "huge" not in kinds else "mixed"


def _merge_parquet_and_lines(parquet: Column, lines: Column) -> Column | None:
    """Merge a column of Parquet files with one of lines. Integers of lines fit a double column as numbers."""
    own, theirs = parquet.field.type, lines.field.type
    if not lines.kinds:
        return parquet
    if pa.types.is_null(own):
        return replace(lines, kinds=None)
    if pa.types.is_floating(own) and lines.kinds <= _NUMBERS:
        json = parquet.json or "int" in lines.kinds
        return replace(parquet, field=parquet.field.with_type(pa.float64()), json=json)
    if is_json(own) or parquet.json:
        return parquet if lines.json and theirs == pa.string() else None
    kind = None if lines.json else common_type(own, theirs)
    return None if kind is None else replace(parquet, field=parquet.field.with_type(kind))


def _kind(column: Column) -> str:
    if not column.json:
        return str(column.field.type)
    return "numbers" if pa.types.is_floating(column.field.type) else "a nested value"
