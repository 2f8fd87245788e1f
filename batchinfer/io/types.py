"""Column types: the common type of two columns, and conversion of columns between types.

Files of one job may store a column in several ways: integers of different widths, text as string, large_string or
dictionary, structs with different fields. Rows keep the type of their file (`row_type`), so that a value never
depends on another file; only a Parquet part needs the one type that holds all values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_VIEWS: dict[pa.DataType, pa.DataType] = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
_TEXTS = {pa.string(), pa.large_string()}
_FLOATS = [pa.float16(), pa.float32(), pa.float64()]


def is_json(kind: pa.DataType) -> bool:
    """Return True for Arrow's JSON type, whose cells are the text of a JSON value.

    Parquet's logical type JSON is read as this type.
    """
    return isinstance(kind, pa.JsonType)


def is_text(kind: pa.DataType) -> bool:
    """Return True for text in any form, including dictionaries and bytes."""
    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    bytes_ = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(kind in _TEXTS or types.is_string_view(kind) or bytes_)


def is_listed(kind: pa.DataType) -> bool:
    """Return True for a list in any form."""
    types = pa.types
    views = types.is_list_view(kind) or types.is_large_list_view(kind)
    return bool(views or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def row_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of rows: strings and lists instead of views, and values instead of dictionaries.

    Arrow lacks most functions for views, and each row group has its own dictionary.
    """
    return _map_type(kind, lambda part: part.value_type if pa.types.is_dictionary(part) else _without_view(part))


def part_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a Parquet part: dictionaries stay, with indices wide enough for a chunk's row groups."""

    def other(part: pa.DataType) -> pa.DataType:
        if pa.types.is_dictionary(part):
            return pa.dictionary(pa.int32(), part.value_type, part.ordered)
        return _without_view(part)

    return _map_type(kind, other)


def _without_view(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list_view(kind):
        return pa.list_(kind.value_field)
    return pa.large_list(kind.value_field) if pa.types.is_large_list_view(kind) else _VIEWS.get(kind, kind)


def _map_type(kind: pa.DataType, other: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return the type with `other` applied to every part of it, at any depth."""

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(_map_type(field.type, other))

    kind = other(kind)
    if pa.types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    return pa.large_list(inner(kind.value_field)) if pa.types.is_large_list(kind) else kind


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """Return the one type that holds the values of both without change, or None if there is none.

    Integers combine with integers and floats with floats, but not one with the other, nor numbers with text.
    """
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_dictionary(first) or pa.types.is_dictionary(second):
        return common_type(*(kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (first, second)))
    pair = {first, second}
    if pair == _TEXTS:
        return pa.string()
    if pair == {pa.binary(), pa.large_binary()}:
        return pa.binary()
    if pair <= set(_FLOATS):
        return max(pair, key=_FLOATS.index)
    if is_json(first) and is_json(second):
        return pa.json_()
    return _common_number(first, second) or _common_nested(first, second)


def _common_number(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if types.is_integer(first) and types.is_integer(second):
        if types.is_signed_integer(first) == types.is_signed_integer(second):
            return max(first, second, key=lambda kind: kind.bit_width)
        return pa.int64() if pa.uint64() not in (first, second) else None
    if types.is_decimal(first) and types.is_decimal(second) and first.scale == second.scale:
        return max(first, second, key=lambda kind: (kind.precision, kind.bit_width))
    return None


def _common_nested(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    if is_listed(first) and is_listed(second):
        value = common_type(first.value_type, second.value_type)
        large = pa.types.is_large_list(first) and pa.types.is_large_list(second)
        return None if value is None else pa.large_list(value) if large else pa.list_(value)
    if pa.types.is_map(first) and pa.types.is_map(second):
        key, item = common_type(first.key_type, second.key_type), common_type(first.item_type, second.item_type)
        return pa.map_(key, item) if key is not None and item is not None else None
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        return _common_struct(first, second)
    return None


def _common_struct(first: pa.StructType, second: pa.StructType) -> pa.DataType | None:
    """Merge the fields by name, those of the first in their order, then the rest.

    A field that one side lacks is null there.
    """
    kinds: dict[str, pa.DataType] = {}
    for struct in (first, second):
        if len({field.name for field in struct}) < struct.num_fields:
            return None
        for field in struct:
            kind = common_type(kinds.get(field.name, pa.null()), field.type)
            if kind is None:
                return None
            kinds[field.name] = kind
    return pa.struct(list(kinds.items()))


def fit_to_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the same values as `kind`: a `common_type` of this type, or its `row_type` or `part_type`."""
    if column.type == kind:
        return column
    return pa.chunked_array([_fit(chunk, kind) for chunk in column.chunks], kind)


def _fit(array: pa.Array, kind: pa.DataType) -> Any:
    own = array.type
    if own == kind:
        return array
    if pa.types.is_null(own):
        return pa.nulls(len(array), kind)
    if is_json(own):
        return _fit(array.storage, kind)
    if is_json(kind):
        return pa.ExtensionArray.from_storage(kind, _fit(array, kind.storage_type))
    if pa.types.is_dictionary(own):
        return _fit(array.dictionary_decode(), kind)
    if pa.types.is_struct(own):
        return _fit_struct(array, kind)
    if pa.types.is_map(own):
        starts, first, count = _starts(array)
        inner = (array.keys.slice(first, count), array.items.slice(first, count))
        parts = (starts, _fit(inner[0], kind.key_type), _fit(inner[1], kind.item_type))
        return pa.MapArray.from_arrays(*parts, type=kind, mask=array.is_null())
    if is_listed(own) and not pa.types.is_fixed_size_list(kind):
        return _fit_list(array, kind)
    return array.cast(kind)


def _fit_struct(array: pa.StructArray, kind: pa.StructType) -> pa.StructArray:
    places = {field.name: place for place, field in enumerate(array.type)}
    children = [
        _fit(array.field(places[field.name]), field.type) if field.name in places else pa.nulls(len(array), field.type)
        for field in kind
    ]
    return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())


def _fit_list(array: Any, kind: pa.DataType) -> Any:
    own = array.type
    if pa.types.is_list(own) or pa.types.is_large_list(own):
        starts, first, count = _starts(array)
        values = array.values.slice(first, count)
    elif pa.types.is_fixed_size_list(own):
        starts = pa.array(range(0, (len(array) + 1) * own.list_size, own.list_size) or [0] * (len(array) + 1))
        values = array.values.slice(array.offset * own.list_size, len(array) * own.list_size)
    else:  # the values of a list view are in any order
        spans = [(0, 0) if size is None else (start, size) for start, size in _view_spans(array)]
        starts = pa.array([0, *accumulate(size for _, size in spans)])
        places = [place for start, size in spans for place in range(start, start + size)]
        values = _fit(array.values, kind.value_type).take(pa.array(places, pa.int64()))
    size, form = (pa.int64(), pa.LargeListArray) if pa.types.is_large_list(kind) else (pa.int32(), pa.ListArray)
    return form.from_arrays(starts.cast(size), _fit(values, kind.value_type), type=kind, mask=array.is_null())


def _starts(array: Any) -> tuple[pa.Array, int, int]:
    """Return the relative start of each list of a slice, and the position and number of the values they share."""
    offsets = array.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    return pc.subtract(offsets, offsets[0]), first, last - first


def _view_spans(array: Any) -> Iterable[tuple[int, int | None]]:
    sizes = pc.if_else(array.is_valid(), array.sizes, None)
    return zip(array.offsets.to_pylist(), sizes.to_pylist(), strict=True)
