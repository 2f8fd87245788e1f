"""Tests of Arrow cells as Python values and in lines: the value of any type, alone and among other cells."""

import decimal

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings

from batchinfer.errors import InvalidInput
from batchinfer.io.cells import cells_of, json_cells_of, json_line_cells_of, line_cells_of
from batchinfer.values.cell import Struct, Unrepresentable
from batchinfer.values.plain import display_text
from tests.io.arrow_types import arrays, mean


def chunked(array):
    return pa.chunked_array([array])


@settings(deadline=None, max_examples=300)
@given(drawn=arrays())
def test_cell_value_does_not_depend_on_other_cells(drawn):
    kind, values, array = drawn
    alone = [chunked(array.slice(place, 1)) for place in range(len(values))]
    lines = [orjson.dumps(value) for value in line_cells_of(chunked(array))]
    assert [orjson.loads(line) for line in lines] == [mean(kind, value) for value in values]
    assert lines == [orjson.dumps(line_cells_of(cell)[0]) for cell in alone]
    cells = [display_text(value) for value in cells_of(chunked(array))]
    assert cells == [display_text(cells_of(cell)[0]) for cell in alone]


def test_float16_and_float32_have_their_shortest_digits():
    numbers = [9.99, None, float("nan"), float("-inf"), 3.4e38, 1e-10, 0.0]
    found = cells_of(chunked(pa.array(numbers, pa.float32())))
    assert list(map(repr, found)) == ["9.99", "None", "nan", "-inf", "3.4e+38", "1e-10", "0.0"]
    halves = cells_of(chunked(pa.array([None, np.float16(0.1), np.float16("inf")], pa.float16())))
    assert list(map(repr, halves)) == ["None", "0.1", "inf"]
    nested = cells_of(chunked(pa.array([[0.1], None], pa.list_(pa.float32()))))
    assert nested == [[0.1], None]


def test_bytes_become_text_only_if_utf8():
    text, *others, null = cells_of(chunked(pa.array([b"\xc3\xa4", b"\xff", b"a\0", None])))
    assert (text, null) == ("ä", None)
    for other in others:
        with pytest.raises(InvalidInput, match="bytes that are not UTF-8 text"):
            str(other)
    assert cells_of(chunked(pa.array([[b"x"]])))[0] == ["x"]


def test_null_is_omitted_in_a_struct_and_kept_in_a_map():
    kind = pa.struct({"a": pa.int32(), "b": pa.string(), "m": pa.map_(pa.string(), pa.int32())})
    first, second, third = cells_of(
        chunked(pa.array([{"a": 1, "m": [("k", None)]}, None, {"a": 2, "b": "", "m": []}], kind))
    )
    assert first == {"a": 1, "m": {"k": None}} and isinstance(first, Struct) and first.nulls == ("b",)
    assert (second, third) == (None, {"a": 2, "b": "", "m": {}})


@pytest.mark.parametrize(
    ("key", "cell", "line"),
    [
        (pa.int32(), {5: 1}, {"5": 1}),
        (pa.bool_(), {"true": 1}, {"true": 1}),
        (pa.date32(), {"1970-01-06": 1}, {"1970-01-06": 1}),
        (pa.binary(), {"a": 1}, {"YQ==": 1}),
        (pa.struct({"x": pa.int32()}), {'{"x":7}': 1}, {'{"x":7}': 1}),
    ],
)
def test_map_key_is_converted_for_rows_and_lines(key, cell, line):
    given = {pa.bool_(): True, pa.binary(): b"a"}.get(key, {"x": 7} if pa.types.is_struct(key) else 5)
    column = chunked(pa.array([[(given, 1)], None], pa.map_(key, pa.int32())))
    assert cells_of(column) == [cell, None] and line_cells_of(column) == [line, None]


def test_struct_with_duplicate_field_names_is_unrepresentable():
    one = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["a", "a"], mask=pa.array([False, True]))
    bad, null = cells_of(chunked(one))
    assert null is None
    with pytest.raises(InvalidInput, match=r"several fields of struct<a: int64, a: int64> have the same name"):
        str(bad)


def test_map_with_invalid_text_key_is_unrepresentable():
    pairs = [[(b"a", 1)], [(b"\xff", 1), (b"\xfe", 2)], None]
    good, bad, null = cells_of(chunked(pa.array(pairs, pa.map_(pa.binary(), pa.int8()))))
    assert (good, null) == ({"a": 1}, None)
    with pytest.raises(InvalidInput, match="a key of it: 1 bytes that are not UTF-8 text"):
        str(bad)


def test_map_keys_stay_distinct_in_lines():
    kind = pa.struct({"x": pa.float64(), "t": pa.timestamp("s")})
    column = chunked(pa.array([[({"x": float("nan"), "t": 10**15}, 1)]], pa.map_(kind, pa.int32())))
    assert orjson.dumps(line_cells_of(column)) == rb'[{"{\"x\":NaN,\"t\":\"+31690708-07-05T01:46:40\"}":1}]'


def test_unreadable_value_fails_only_its_own_cell():
    damaged = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes()), pa.py_buffer(b"a\xffb")
    )
    first, second, third = cells_of(chunked(damaged))
    assert (first, type(second), third) == ("a", Unrepresentable, "b")
    assert line_cells_of(chunked(damaged)) == ["a", None, "b"]
    nested = chunked(pa.array([[1], [2**62], []], pa.list_(pa.timestamp("s"))))
    assert [type(item) for [item] in cells_of(nested)[:2]][1] is Unrepresentable
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
    with pytest.raises(InvalidInput, match=r"sparse_union.* cannot be used"):
        str(cells_of(chunked(union))[0])


def test_json_text_is_parsed_for_rows_and_embedded_in_lines():
    texts = ['{"a":[1]}', None, '"x"', "100000000000000000000000000001", "{", '{\n "b": "\\n"}', "[" * 2000]
    column = chunked(pa.array(texts))
    values = cells_of(column), json_cells_of(column)
    assert values[1][:4] == [{"a": [1]}, None, "x", 10**29 + 1] and values[1][5] == {"b": "\n"}
    for bad in (values[1][4], values[1][6]):
        with pytest.raises(InvalidInput, match="not JSON"):
            str(bad)
    lines = [orjson.dumps({"x": fragment}) for fragment in json_line_cells_of(column)]
    assert b"\n" not in b"".join(lines)
    assert [orjson.loads(line)["x"] for line in lines[:3]] == [{"a": [1]}, None, "x"]
    assert [orjson.loads(line)["x"] for line in lines[4:]] == ["{", {"b": "\n"}, "[" * 2000]
    assert orjson.dumps(json_line_cells_of(chunked(pa.array(["[NaN, -Infinity]", "NaN"])))) == b"[[null, null],null]"
    both = pa.array(['{"a":12345678901234567890123,"n":[NaN,-Infinity,"NaN \\" NaN\u2028"]}', '{"a":NaN,}'])
    assert [orjson.dumps(line) for line in json_line_cells_of(chunked(both))] == [
        '{"a":12345678901234567890123,"n":[null,null,"NaN \\" NaN\u2028"]}'.encode(),
        rb'"{\"a\":NaN,}"',
    ]
    digits = '{"a":[123456789012345678901234567890,1.5],"b":"00000000000000000000"}'
    assert json_cells_of(chunked(pa.array([digits]))) == [{"a": [123456789012345678901234567890, 1.5], "b": "0" * 20}]
    typed = chunked(pa.array(['{"a": 1}', None, "no"], pa.json_()))
    assert json_cells_of(typed)[:2] == cells_of(typed)[:2] == [{"a": 1}, None]
    assert orjson.dumps(line_cells_of(typed)) == b'[{"a": 1},null,"no"]'


def test_decimal_keeps_every_digit():
    digits = "12345678901234567890123456789012345678901234567890.5"
    column = chunked(pa.array([decimal.Decimal(digits), decimal.Decimal("0.0")], pa.decimal256(52, 1)))
    assert line_cells_of(column) == [digits, "0.0"] and list(map(str, cells_of(column))) == [digits, "0.0"]
