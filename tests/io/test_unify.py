"""Tests of schema unification: compatible and conflicting types, and values independent of other files."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError
from batchinfer.io.types import _map_type, common_type, fit_to_type, is_json, part_type, row_type
from tests.io.reading import read_all, scan_all, write_lines, write_parquet

STRING, LARGE, VIEW = pa.string(), pa.large_string(), pa.string_view()
BIG = pa.dictionary(pa.int32(), LARGE)
SMALL = pa.dictionary(pa.int8(), STRING)


def struct(**fields):
    return pa.struct(list(fields.items()))


class TestCommonTypes:
    @pytest.mark.parametrize(
        ("first", "second", "both"),
        [
            (pa.int32(), pa.int64(), pa.int64()),
            (pa.uint8(), pa.int8(), pa.int64()),
            (pa.uint16(), pa.uint64(), pa.uint64()),
            (pa.uint64(), pa.int64(), None),
            (pa.float32(), pa.float64(), pa.float64()),
            (pa.float16(), pa.float32(), pa.float32()),
            (pa.int64(), pa.float64(), None),
            (pa.bool_(), pa.int64(), None),
            (STRING, LARGE, STRING),
            (SMALL, BIG, STRING),
            (SMALL, STRING, STRING),
            (SMALL, pa.int8(), None),
            (pa.binary(), pa.large_binary(), pa.binary()),
            (STRING, pa.binary(), None),
            (pa.null(), pa.date32(), pa.date32()),
            (pa.decimal128(5, 2), pa.decimal128(9, 2), pa.decimal128(9, 2)),
            (pa.decimal128(5, 2), pa.decimal128(5, 3), None),
            (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
            (pa.json_(), pa.json_(LARGE), pa.json_()),
            (pa.json_(), STRING, None),
            (pa.uuid(), pa.uuid(), pa.uuid()),
            (pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64())),
            (pa.list_(STRING, 2), pa.list_(STRING, 3), pa.list_(STRING)),
            (pa.list_(STRING), STRING, None),
            (struct(a=pa.int32(), b=STRING), struct(b=LARGE, a=pa.int64()), struct(a=pa.int64(), b=STRING)),
            (struct(a=pa.int32()), struct(b=STRING), struct(a=pa.int32(), b=STRING)),
            (struct(a=pa.int32()), struct(a=STRING), None),
            (pa.list_(struct(a=SMALL)), pa.list_(struct(a=STRING)), pa.list_(struct(a=STRING))),
            (pa.map_(STRING, pa.int8()), pa.map_(LARGE, pa.int64()), pa.map_(STRING, pa.int64())),
            (pa.map_(STRING, pa.int8()), struct(a=pa.int8()), None),
        ],
    )
    def test_common_type_of_two_types(self, first, second, both):
        assert common_type(first, second) == both
        swapped = common_type(second, first)
        assert (swapped is None) == (both is None)
        assert common_type(first, first) == first == common_type(first, pa.null()) == common_type(pa.null(), first)

    def test_dictionaries_unify_despite_index_types(self):
        wide = pa.dictionary(pa.int64(), STRING)
        assert common_type(part_type(SMALL), part_type(wide)) == pa.dictionary(pa.int32(), STRING)

    def test_nullability_unifies(self):
        strict = pa.struct([pa.field("a", STRING, nullable=False)])
        assert common_type(strict, struct(a=STRING)) == struct(a=STRING)
        assert common_type(pa.list_(pa.field("item", STRING, nullable=False)), pa.list_(STRING)) == pa.list_(STRING)


# a type, values of it, and a wider form of it
leaves = st.sampled_from(
    [
        (pa.int8(), st.integers(-128, 127), pa.int64()),
        (pa.float32(), st.sampled_from([0.5, -2.0, 1e20]), pa.float64()),
        (STRING, st.text(max_size=3), LARGE),
        (VIEW, st.text(max_size=3), STRING),
        (SMALL, st.sampled_from(["a", "b"]), STRING),
        (pa.json_(), st.sampled_from(["1", '{"a":2}']), pa.json_(LARGE)),
        (pa.null(), st.none(), pa.date32()),
    ]
)


def nested(inner):
    def listed(form, wider):
        return inner.map(lambda i: (form(i[0]), st.lists(st.none() | i[1], max_size=3), wider(i[2])))

    def mapped(i):
        keys = st.dictionaries(st.text(max_size=2), st.none() | i[1], max_size=2)
        return pa.map_(STRING, i[0]), keys.map(lambda d: list(d.items())), pa.map_(LARGE, i[2])

    def fields(pair):
        (a, b) = pair
        values = st.fixed_dictionaries({"a": st.none() | a[1], "b": st.none() | b[1]})
        return struct(a=a[0], b=b[0]), values, struct(b=b[2], c=STRING, a=a[2])

    return st.one_of(
        listed(pa.list_, pa.large_list),
        listed(pa.large_list_view, pa.list_),
        inner.map(mapped),
        st.tuples(inner, inner).map(fields),
    )


@st.composite
def columns(draw):
    kind, values, wider = draw(st.recursive(leaves, nested, max_leaves=4))
    cells = draw(st.lists(st.none() | values, min_size=1, max_size=6))
    bare = _map_type(row_type(kind), lambda part: part.storage_type if is_json(part) else part)
    views = part_type(kind) != kind and bare == part_type(
        kind
    )  # pyarrow builds no dictionaries and extensions in lists
    column = fit_to_type(
        pa.chunked_array([pa.array(cells, kind if views else bare)]), kind if views else part_type(kind)
    )
    cut = draw(st.integers(0, len(cells)))
    return pa.chunked_array([*column.slice(cut).chunks, *column.slice(0, cut).chunks], column.type), wider


def without_added(value):
    """Drop the field `c`, which a struct has only because of another file."""
    if isinstance(value, dict):
        assert value.get("c") is None
        return {name: without_added(inner) for name, inner in value.items() if name != "c"}
    return type(value)(map(without_added, value)) if isinstance(value, list | tuple) else value


@settings(max_examples=80, deadline=None)
@given(drawn=columns())
def test_column_keeps_its_values_in_a_wider_type(drawn):
    column, wider = drawn
    rows = fit_to_type(column, row_type(column.type))
    assert rows.to_pylist() == column.to_pylist()
    rows.take(pa.array([0])).validate(full=True)
    assert fit_to_type(rows, part_type(column.type)).to_pylist() == column.to_pylist()
    both = common_type(part_type(column.type), wider)
    held = fit_to_type(column, both)
    held.validate(full=True)
    assert held.type == both
    assert without_added(held.to_pylist()) == column.to_pylist()


class TestFiles:
    def test_encodings_of_a_column_unify_and_rows_keep_their_values(self, tmp_path):
        first = pa.table(
            {
                "n": pa.array([1], pa.int8()),
                "f": pa.array([9.99], pa.float32()),
                "t": pa.array(["a"]).dictionary_encode(),
                "s": pa.array([{"a": 1}], struct(a=pa.int32())),
                "v": pa.array([["x", None]], pa.list_view(VIEW)),
            }
        )
        second = pa.table(
            {
                "v": pa.array([["y"]], pa.large_list(STRING)),
                "s": pa.array([{"b": "z", "a": 2}], struct(b=STRING, a=pa.int64())),
                "t": pa.array(["b"], LARGE),
                "f": [0.5],
                "n": [2**40],
            }
        )
        a, b = write_parquet(tmp_path / "a.parquet", first), write_parquet(tmp_path / "b.parquet", second)
        for paths, names in (((a, b), first.column_names), ((b, a), second.column_names)):
            inputs = scan_all(*paths)
            assert inputs.schema.names == names
            kinds = {field.name: field.type for field in inputs.schema}
            assert kinds["n"] == pa.int64() and kinds["f"] == pa.float64() and kinds["t"] == STRING
            rows = read_all(inputs)[0]
            assert {"n": 2**40, "f": 0.5, "t": "b", "s": {"b": "z", "a": 2}, "v": ["y"]} in rows
            one = next(row for row in rows if row["n"] == 1)
            assert (one["t"], one["s"], one["v"]) == ("a", {"a": 1}, ["x", None])
            assert one["f"] == pytest.approx(9.99, abs=1e-6)

    def test_unneeded_column_may_conflict(self, tmp_path):
        a = write_parquet(tmp_path / "a.parquet", pa.table({"x": [1], "drift": [1], "gone": [1]}))
        twice = pa.Table.from_arrays(
            [pa.array(["s"]), pa.array([2]), pa.array([3]), pa.array([4])], ["drift", "x", "two", "two"]
        )
        b = write_parquet(tmp_path / "b.parquet", twice)
        inputs = scan_all(a, b, columns=("x",))
        assert inputs.schema.names == ["x"]
        assert read_all(inputs)[0] == [{"x": 1}, {"x": 2}]
        for name, words in (("drift", "string"), ("gone", "all files need it"), ("two", "exists twice")):
            with pytest.raises(InputError, match=rf"column '{name}'.*{words}"):
                scan_all(a, b, columns=("x", name))
        with pytest.raises(InputError, match=r"int64 in .*a\.parquet but string in .*b\.parquet.*input\.columns"):
            scan_all(a, b)

    def test_unneeded_column_of_lines_may_conflict(self, tmp_path):
        a = write_lines(tmp_path / "a.jsonl", [{"x": 1, "y": "s"}])
        b = write_lines(tmp_path / "b.jsonl", [{"x": 2, "y": 5}])
        assert scan_all(a, b, columns=("x",)).schema.names == ["x"]

    def test_files_without_rows_do_not_decide_types(self, tmp_path):
        full = write_parquet(tmp_path / "a.parquet", pa.table({"x": ["s"], "y": [1]}))
        empty = write_parquet(tmp_path / "b.parquet", pa.table({"x": pa.array([], pa.float64())}))
        for paths in ((full, empty), (empty, full)):
            inputs = scan_all(*paths)
            assert inputs.schema.names == ["x", "y"]
            assert read_all(inputs)[0] == [{"x": "s", "y": 1}]
        assert scan_all(empty).schema.types == [pa.float64()]

    def test_int_and_float_lines_unify_with_a_double_column(self, tmp_path):
        """Each row keeps the number that its own file has."""
        lines = write_lines(tmp_path / "a.jsonl", [{"x": 3}, {"x": 2.5}, {"x": None}])
        whole = write_lines(tmp_path / "b.jsonl", [{"x": 4}])
        double = write_parquet(tmp_path / "c.parquet", pa.table({"x": [3.0, None]}))
        single = write_parquet(tmp_path / "d.parquet", pa.table({"x": pa.array([9.99, 4.0], pa.float32())}))
        inputs = scan_all(lines, whole, double, single)
        assert inputs.schema.field("x").type == pa.float64()
        found = [repr(row["x"]) for row in read_all(inputs)[0]]
        assert found == ["3", "2.5", "None", "4", "3.0", "None", "9.99", "4.0"]
        with pytest.raises(InputError, match=r"numbers in .*a\.jsonl:1 but int64"):
            scan_all(lines, write_parquet(tmp_path / "e.parquet", pa.table({"x": [1]})))

    def test_json_column_unifies_with_lines(self, tmp_path):
        table = pa.table({"m": pa.array(['[{"role": "user"}]', None], pa.json_())})
        parquet = write_parquet(tmp_path / "a.parquet", table)
        lines = write_lines(tmp_path / "b.jsonl", [{"m": [{"role": "tool"}]}])
        for paths in ((parquet, lines), (lines, parquet)):
            inputs = scan_all(*paths)
            assert inputs.text_json == {"m"} and inputs.schema.field("m").type == pa.json_()
            found = [row["m"] for row in read_all(inputs)[0]]
            assert [{"role": "user"}] in found and [{"role": "tool"}] in found and None in found
        with pytest.raises(InputError, match=r"nested value in .*a\.parquet but string in .*c\.parquet"):
            scan_all(parquet, write_parquet(tmp_path / "c.parquet", pa.table({"m": ["text"]})))
