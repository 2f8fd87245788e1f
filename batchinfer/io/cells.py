"""Conversion of Arrow columns to Python values and to JSON values, by column type and cell by cell.

A cell's value does not depend on other cells. Values that Python cannot represent become Unrepresentable and fail only
their own row.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.values import times
from batchinfer.values.cell import Struct, Unrepresentable
from batchinfer.values.number import Number
from batchinfer.values.plain import display_text, parse_exact_json, replace_nonfinite_text
from batchinfer.values.texts import interval_text

_NANOS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_DAY_MS = 86_400_000
_PROBLEMS = (pa.ArrowException, ValueError, TypeError, LookupError, OverflowError, RecursionError)
Cells = list[Any]


def cells_of(column: pa.ChunkedArray) -> Cells:
    """Return the cells of a column as Python values, for templates and messages."""
    return [value for chunk in column.chunks for value in _converted(chunk, False)]


def line_cells_of(column: pa.ChunkedArray) -> Cells:
    """Return the cells of a column in JSON's types: times and decimals as text, bytes in base64."""
    return [value for chunk in column.chunks for value in _converted(chunk, True)]


def json_cells_of(column: pa.ChunkedArray) -> Cells:
    """Parse the JSON texts of a column."""
    return [None if text is None else _parsed(text) for text in cells_of(_stored(column))]


def json_line_cells_of(column: pa.ChunkedArray) -> Cells:
    """Return JSON texts for embedding in a JSON line. Invalid JSON is embedded as a string."""
    return [None if text is None else _fragment(text) for text in line_cells_of(_stored(column))]


def fragments_of(column: pa.ChunkedArray) -> Cells:
    """Return single-line JSON texts for embedding in a JSON line, without validation."""
    return [None if text is None else orjson.Fragment(text) for text in column.to_pylist()]


def _stored(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def _parsed(text: str | Unrepresentable) -> Any:
    if isinstance(text, Unrepresentable):
        return text
    try:
        return parse_exact_json(text)
    except ValueError as error:
        return Unrepresentable(f"not JSON: {error}", text)


def _fragment(text: str) -> Any:
    """Return a JSON fragment with null for NaN and infinity; return invalid JSON unchanged as text."""
    if not _is_json(text):
        finite = replace_nonfinite_text(text)
        if finite == text or not _is_json(finite):
            return text
        text = finite
    return orjson.Fragment(text.replace("\n", " ").replace("\r", " "))  # line breaks in JSON can only be white space


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _converted(array: pa.Array, lines: bool) -> Cells:
    try:
        return _convert(array, lines)
    except _PROBLEMS as error:
        if len(array) == 1:
            return [None if lines else Unrepresentable(f"cannot be read: {error}")]
    return [value for place in range(len(array)) for value in _converted(array.slice(place, 1), lines)]


def _convert(array: pa.Array, lines: bool) -> Cells:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(array, lines)
    return _CONVERTERS.get(kind.id, _unknown)(array, lines)


def _to_pylist(array: pa.Array, lines: bool) -> Cells:
    values: Cells = array.to_pylist()
    return values


def _unknown(array: pa.Array, lines: bool) -> Cells:
    cell = Unrepresentable(f"values of type {array.type} cannot be used")
    return [None if lines or not valid else cell for valid in array.is_valid().to_pylist()]


def _each(values: Cells, make: Callable[[Any], Any], lines: bool) -> Cells:
    """Return `make(value)` of each value that is not null; with `lines`, its text."""
    if not lines:
        return [None if value is None else make(value) for value in values]
    return [None if value is None else _text(make(value)) for value in values]


def _text(value: Any) -> str | None:
    return value.text if type(value) is Unrepresentable else str(value)


# -- numbers and bytes --------------------------------------------------------------------------------------------


def _float32(array: pa.Array, lines: bool) -> Cells:
    """Return doubles with the shortest digits that identify each float32: 9.99, not 9.989999771118164."""
    numbers = array.to_numpy(zero_copy_only=False)  # null is NaN
    values: Cells = orjson.loads(orjson.dumps(np.ascontiguousarray(numbers), option=orjson.OPT_SERIALIZE_NUMPY))
    for place in np.flatnonzero(~np.isfinite(numbers)).tolist():  # null in JSON
        values[place] = float(numbers[place]) if array[place].is_valid else None
    return values


def _float16(array: pa.Array, lines: bool) -> Cells:
    return [None if bits is None else _half(bits) for bits in array.view(pa.uint16()).to_pylist()]


@functools.cache
def _half(bits: int) -> float:
    return float(str(np.uint16(bits).view(np.float16)))


def _decimal(array: pa.Array, lines: bool) -> Cells:
    return _each(array.to_pylist(), Number, lines)


def _bytes(array: pa.Array, lines: bool) -> Cells:
    if lines:
        return [None if value is None else base64.b64encode(value).decode() for value in array.to_pylist()]
    return _each(array.to_pylist(), _utf8, lines)


def _utf8(value: bytes) -> str | Unrepresentable:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    return text if "\0" not in text else Unrepresentable(f"{len(value)} bytes that are not UTF-8 text")


# -- times --------------------------------------------------------------------------------------------------------


def _to_integers(array: pa.Array) -> Cells:
    values: Cells = array.view(pa.int32() if array.type.bit_width == 32 else pa.int64()).to_pylist()
    return values


def _date(array: pa.Array, lines: bool) -> Cells:
    if pa.types.is_date64(array.type):
        return _each(_to_integers(array), lambda millis: times.date(millis // _DAY_MS), lines)
    return _each(_to_integers(array), times.date, lines)


def _time(array: pa.Array, lines: bool) -> Cells:
    unit = _NANOS[array.type.unit]
    return _each(_to_integers(array), lambda value: times.time(value * unit), lines)


def _timestamp(array: pa.Array, lines: bool) -> Cells:
    unit, zone = _NANOS[array.type.unit], times.zone_of(array.type.tz)
    return _each(_to_integers(array), lambda value: times.timestamp(value * unit, zone), lines)


def _duration(array: pa.Array, lines: bool) -> Cells:
    unit = _NANOS[array.type.unit]
    return _each(_to_integers(array), lambda value: times.duration(value * unit), lines)


def _interval(array: pa.Array, lines: bool) -> Cells:
    return _each(array.to_pylist(), lambda value: interval_text(*value), lines)


def interval_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return Parquet's INTERVAL values as text: months, days and milliseconds of 32 bits each."""
    parts = [value and struct.unpack("<III", value) for value in column.to_pylist()]
    texts = [part and interval_text(part[0], part[1], part[2] * 10**6) for part in parts]
    return pa.chunked_array([texts], pa.string())


# -- nested values ------------------------------------------------------------------------------------------------


def _list(array: pa.Array, lines: bool) -> Cells:
    if _CONVERTERS.get(array.type.value_type.id) is _to_pylist:
        return _to_pylist(array, lines)
    items = _convert(array.flatten(), lines)
    lengths = pc.list_value_length(array).to_pylist()
    ends = accumulate((length or 0 for length in lengths), initial=0)
    spans = zip(lengths, pairwise(ends), strict=True)
    return [None if length is None else items[start:stop] for length, (start, stop) in spans]


def _struct(array: pa.StructArray, lines: bool) -> Cells:
    names = [field.name for field in array.type]
    if len({*names}) < len(names) and not lines:
        cell = Unrepresentable(f"several fields of {array.type} have the same name")
        return [cell if valid else None for valid in array.is_valid().to_pylist()]
    columns = [_convert(array.field(place), lines) for place in range(len(names))]
    rows = zip(*columns, strict=True) if names else iter([()] * len(array))
    valid = array.is_valid().to_pylist()
    return [_fields(names, row) if is_valid else None for row, is_valid in zip(rows, valid, strict=True)]


def _fields(names: list[str], row: tuple[Any, ...]) -> dict[str, Any]:
    present = {name: value for name, value in zip(names, row, strict=True) if value is not None}
    return (
        present if len(present) == len(names) else Struct(present, tuple(name for name in names if name not in present))
    )


def _map(array: pa.MapArray, lines: bool) -> Cells:
    offsets = array.offsets.to_pylist()
    first, last = offsets[0], offsets[-1]
    keys = [_key(key, lines) for key in _convert(array.keys.slice(first, last - first), lines)]
    items = _convert(array.items.slice(first, last - first), lines)
    pairs = list(zip(keys, items, strict=True))
    spans = zip(array.is_valid().to_pylist(), pairwise(offsets), strict=True)
    make = _mapping if any(type(key) is Unrepresentable for key in keys) else dict
    return [make(pairs[start - first : stop - first]) if valid else None for valid, (start, stop) in spans]


def _key(key: Any, lines: bool) -> str | int | Unrepresentable:
    if isinstance(key, str) or (type(key) is int and not lines) or (type(key) is Unrepresentable and key.text is None):
        return key
    return display_text(key)


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[Any, Any] | Unrepresentable:
    bad = next((key for key, _ in pairs if type(key) is Unrepresentable), None)
    return dict(pairs) if bad is None else Unrepresentable(f"a key of it: {bad.why}")


def _dictionary(array: pa.DictionaryArray, lines: bool) -> Cells:
    places, dictionary = array.indices.to_pylist(), array.dictionary
    if len(dictionary) <= len(array):
        values: Any = _convert(dictionary, lines)
    else:  # a slice of a long column; `take` does not support all types
        values = {place: _convert(dictionary.slice(place, 1), lines)[0] for place in {*places} if place is not None}
    return [None if place is None else values[place] for place in places]


def _runs(array: pa.RunEndEncodedArray, lines: bool) -> Cells:
    first, count = array.find_physical_offset(), array.find_physical_length()
    values = _convert(array.values.slice(first, count), lines)
    ends = [min(end - array.offset, len(array)) for end in array.run_ends.slice(first, count).to_pylist()]
    lengths = (end - start for start, end in pairwise([0, *ends]))
    return [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]


def _extension(array: pa.ExtensionArray, lines: bool) -> Cells:
    name = array.type.extension_name
    if name == "arrow.uuid":
        return _each(array.storage.to_pylist(), _uuid_text, lines)
    if name == "arrow.json":
        change = _fragment if lines else _parsed
        return [None if text is None else change(text) for text in _convert(array.storage, lines)]
    if name == "arrow.bool8":
        return [None if value is None else value != 0 for value in array.storage.to_pylist()]
    return _convert(array.storage, lines)


def _uuid_text(value: bytes) -> str:
    digits = value.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


_CONVERTERS: dict[int, Callable[[Any, bool], Cells]] = {
    kind.id: convert
    for convert, kinds in {
        _to_pylist: [
            *(pa.null(), pa.bool_(), pa.string(), pa.large_string(), pa.string_view(), pa.float64()),
            *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        ],
        _float16: [pa.float16()],
        _float32: [pa.float32()],
        _decimal: [pa.decimal32(1), pa.decimal64(1), pa.decimal128(1), pa.decimal256(1)],
        _bytes: [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1)],
        _date: [pa.date32(), pa.date64()],
        _time: [pa.time32("s"), pa.time64("us")],
        _timestamp: [pa.timestamp("s")],
        _duration: [pa.duration("s")],
        _interval: [pa.month_day_nano_interval()],
        _list: [
            *(pa.list_(pa.null()), pa.large_list(pa.null()), pa.list_(pa.null(), 1)),
            *(pa.list_view(pa.null()), pa.large_list_view(pa.null())),
        ],
        _struct: [pa.struct([])],
        _map: [pa.map_(pa.string(), pa.null())],
        _dictionary: [pa.dictionary(pa.int8(), pa.string())],
        _runs: [pa.run_end_encoded(pa.int32(), pa.string())],
    }.items()
    for kind in kinds
}
