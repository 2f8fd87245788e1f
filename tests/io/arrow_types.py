"""Arrow types with values and their JSON form: the reference for the converters.

The expected text of times, decimals and bytes comes from numpy or the standard library, never from the product itself.
"""

from __future__ import annotations

import base64
import decimal
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

INT64 = st.integers(-(2**63) + 1, 2**63 - 1)


class Kind(NamedTuple):
    """A type with its values. `cells` returns values for `pa.array` with `type`; `meaning` is their JSON form."""

    type: pa.DataType
    cells: st.SearchStrategy[Any]
    meaning: Callable[[Any], Any]


def iso(value: int, unit: str, utc: bool = False) -> str:
    text = str(np.datetime64(value, unit))
    moment, _, fraction = text.partition(".")
    sign = "+" if len(moment.partition("-")[0]) > 4 else ""
    year, _, rest = moment.removeprefix("-").partition("-")
    moment = f"{'-' if text.startswith('-') else sign}{year.zfill(4)}-{rest}"
    fraction = fraction.ljust(9, "0")
    digits = fraction if not fraction.endswith("000") else fraction[:6]
    return moment + (f".{digits}" if int(fraction) else "") + ("+00:00" if utc else "")


def clock(nanos: int) -> str:
    return iso(nanos, "ns").partition("T")[2]


def _fixed(value: decimal.Decimal) -> str:
    sign, digits, exponent = value.as_tuple()
    text = "".join(map(str, digits)).zfill(1 - int(exponent))
    whole, fraction = (text[: int(exponent)], text[int(exponent) :]) if int(exponent) < 0 else (text, "")
    return ("-" if sign else "") + whole + (f".{fraction}" if fraction else "")


def same(value: Any) -> Any:
    return value


def _floats(kind: Any, width: int) -> Kind:
    def meaning(value: float) -> float | None:
        return float(str(kind(value))) if np.isfinite(value) else None

    return Kind(pa.from_numpy_dtype(kind), st.floats(width=width).map(kind), meaning)


def _digits(precision: int, scale: int) -> st.SearchStrategy[decimal.Decimal]:
    whole = st.integers(-(10**precision) + 1, 10**precision - 1)
    return whole.map(lambda value: decimal.Decimal(value).scaleb(-scale, decimal.Context(prec=100)))


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


LEAVES = [
    Kind(pa.string(), st.text(max_size=5), same),
    Kind(pa.large_string(), st.text(max_size=5), same),
    Kind(pa.string_view(), st.text(max_size=20), same),
    Kind(pa.int64(), INT64, same),
    Kind(pa.uint64(), st.integers(0, 2**64 - 1), same),
    Kind(pa.int8(), st.integers(-128, 127), same),
    Kind(pa.bool_(), st.booleans(), same),
    Kind(pa.null(), st.none(), same),
    _floats(np.float64, 64),
    _floats(np.float32, 32),
    _floats(np.float16, 16),
    Kind(pa.decimal128(20, 3), _digits(20, 3), _fixed),
    Kind(pa.decimal256(76, 70), _digits(76, 70), _fixed),
    Kind(pa.binary(), st.binary(max_size=4), _base64),
    Kind(pa.large_binary(), st.binary(max_size=4), _base64),
    Kind(pa.binary_view(), st.binary(max_size=20), _base64),
    Kind(pa.binary(3), st.binary(min_size=3, max_size=3), _base64),
    Kind(pa.date32(), st.integers(-(2**31), 2**31 - 1), lambda days: iso(days, "D")),
    Kind(pa.time32("s"), st.integers(0, 86399), lambda value: clock(value * 10**9)),
    Kind(pa.time64("us"), st.integers(0, 86_400 * 10**6 - 1), lambda value: clock(value * 1000)),
    Kind(pa.time64("ns"), st.integers(0, 86_400 * 10**9 - 1), clock),
    Kind(pa.timestamp("s"), st.integers(-(10**13), 10**13), lambda value: iso(value, "s")),
    Kind(pa.timestamp("ms"), st.integers(-(10**15), 10**15), lambda value: iso(value, "ms")),
    Kind(pa.timestamp("us"), st.integers(-(10**17), 10**17), lambda value: iso(value, "us")),
    Kind(pa.timestamp("ns"), INT64, lambda value: iso(value, "ns")),
    Kind(pa.timestamp("ns", "UTC"), INT64, lambda value: iso(value, "ns", True)),
    Kind(pa.timestamp("us", "Mars/Phobos"), INT64, lambda value: iso(value, "us", True)),
    Kind(pa.uuid(), st.binary(min_size=16, max_size=16), lambda value: str(uuid.UUID(bytes=value))),
]


def _list(inner: Kind, kind: pa.DataType, size: int | None = None) -> Kind:
    cells = st.lists(st.none() | inner.cells, min_size=size or 0, max_size=3 if size is None else size)
    return Kind(kind, cells, lambda items: [mean(inner, item) for item in items])


def mean(kind: Kind, value: Any) -> Any:
    return None if value is None else kind.meaning(value)


def _struct(first: Kind, second: Kind) -> Kind:
    kinds = {"a": first, "b": second}
    cells = st.fixed_dictionaries({name: st.none() | kind.cells for name, kind in kinds.items()})

    def meaning(value: dict[str, Any]) -> dict[str, Any]:
        return {name: mean(kinds[name], item) for name, item in value.items() if item is not None}

    return Kind(pa.struct({name: kind.type for name, kind in kinds.items()}), cells, meaning)


def _map(inner: Kind, number: bool) -> Kind:
    keys: st.SearchStrategy[Any] = st.integers(-5, 5) if number else st.text(max_size=3)
    kind = pa.map_(pa.int32() if number else pa.string(), inner.type)
    cells = st.dictionaries(keys, st.none() | inner.cells, max_size=3).map(lambda value: list(value.items()))
    return Kind(kind, cells, lambda pairs: {str(key): mean(inner, item) for key, item in pairs})


def _nested(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    lists = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
    return st.one_of(
        st.builds(lambda kind, form: _list(kind, form(kind.type)), inner, st.sampled_from(lists)),
        st.builds(lambda kind: _list(kind, pa.list_(kind.type, 2), 2), inner),
        st.builds(_struct, inner, inner),
        st.builds(_map, inner, st.booleans()),
    )


# pyarrow makes no nested arrays of extension types
kinds = st.sampled_from(LEAVES) | st.recursive(st.sampled_from(LEAVES[:-1]), _nested, max_leaves=3)


@st.composite
def arrays(draw: st.DrawFn, max_size: int = 6) -> tuple[Kind, list[Any], pa.Array]:
    """Draw a kind, its values and their array, also as a slice, a dictionary, or run-end encoded."""
    kind = draw(kinds)
    values = draw(st.lists(st.none() | kind.cells, min_size=1, max_size=max_size))
    array = pa.array(values, kind.type)
    form = draw(st.sampled_from(["plain", "slice", "dictionary", "wide dictionary", "runs"]))
    if form == "slice":
        return kind, values[1:], array[1:]
    if form in ("dictionary", "wide dictionary") and not pa.types.is_null(kind.type):
        places = draw(st.lists(st.none() | st.integers(0, len(values) - 1), max_size=len(values) * 2))
        places = places if form == "dictionary" else places[: len(values) - 1]
        array = pa.DictionaryArray.from_arrays(pa.array(places, pa.int8()), array)
        return kind, [None if place is None else values[place] for place in places], array
    if form == "runs" and not isinstance(kind.type, pa.BaseExtensionType):
        lengths = draw(st.lists(st.integers(1, 3), min_size=len(values), max_size=len(values)))
        array = pa.RunEndEncodedArray.from_arrays(pa.array(np.cumsum(lengths), pa.int32()), array)
        values = [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
        cut = draw(st.integers(0, len(values) - 1))
        return kind, values[cut:], array[cut:]
    return kind, values, array
