"""Tests of JSON lines: types, damage, seeking, round trips."""

import contextlib
import gzip
import json
import string
import time

import orjson
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, InvalidInput
from batchinfer.io import jsonl, lines
from batchinfer.io.rows import Inputs, RowSpan, stream_rows, write_rows
from batchinfer.io.source import LocalSource, Sources
from tests.io.reading import LOCAL, compress, read_all, scan_all, write_lines, write_parquet

SUFFIXES = ["jsonl", "jsonl.gz", "jsonl.zst"]


class TestTypes:
    @pytest.mark.parametrize(
        ("values", "kind", "text"),
        [
            (["a", None, ""], pa.string(), False),
            ([1, None, -5], pa.int64(), False),
            ([2**63 - 1, -(2**63)], pa.int64(), False),
            ([1.0, 2.5, None], pa.float64(), False),
            ([1, 2.5, 1.0, 1e22, -0.0, None], pa.float64(), True),
            ([6.02214076e23, -1e300, 1], pa.float64(), True),
            ([True, False], pa.bool_(), False),
            ([None, None], pa.null(), False),
            ([[1], None], pa.string(), True),
            ([{"a": 1}, {}], pa.string(), True),
            (["a", 1], pa.string(), True),
            ([True, 1], pa.string(), True),
            ([2**63, 1], pa.string(), True),
            ([-(2**63) - 1], pa.string(), True),
            ([10**40, 1], pa.string(), True),
            ([2**53 + 1, 0.5], pa.string(), True),  # no double holds both
            ([[10**30, {"b": -(10**25)}], None], pa.string(), True),
        ],
    )
    def test_column_type_holds_its_values_exactly(self, tmp_path, values, kind, text):
        path = write_lines(tmp_path / "a.jsonl", [{"x": value} for value in values])
        inputs = scan_all(path)
        assert inputs.schema.field("x").type == kind
        assert inputs.text_json == (frozenset("x") if text else frozenset())
        [(_, batch)] = stream_rows(inputs, [RowSpan(0, 0, len(values))], LOCAL)
        out = tmp_path / "out.jsonl"
        write_rows(out, batch.table, "jsonl", None, inputs.text_json)
        written = [json.loads(line)["x"] for line in out.read_text().splitlines()]
        assert list(map(repr, written)) == list(map(repr, values))

    def test_missing_key_is_null_and_columns_are_in_order_of_first_use(self, tmp_path):
        path = write_lines(tmp_path / "a.jsonl", [{"b": 1}, {"a": "x"}, {"c": None, "b": 2}])
        inputs = scan_all(path)
        assert inputs.schema.names == ["b", "a", "c"]
        assert read_all(inputs)[0] == [
            {"b": 1, "a": None, "c": None},
            {"b": None, "a": "x", "c": None},
            {"b": 2, "a": None, "c": None},
        ]

    def test_last_value_of_a_duplicate_key_counts(self, tmp_path):
        path = write_lines(tmp_path / "a.jsonl", [b'{"x":"no","x":1}'])
        inputs = scan_all(path)
        assert inputs.schema.field("x").type == pa.int64()
        assert read_all(inputs)[0] == [{"x": 1}]


class TestDamage:
    def test_each_invalid_line_is_its_own_row_error(self, tmp_path):
        good = {"x": "fine"}
        rows = [
            good,
            b'{"x": "cut',
            b"[1]",
            b"null",
            b'{"x": "\xff\xfe"}',
            b'{"x": "\\ud800"}',
            b'{"x": nan}',
            b"7",
            good,
        ]
        path = write_lines(tmp_path / "a.jsonl", rows)
        inputs = scan_all(path)
        found, errors = read_all(inputs)
        assert found == [good] + [{"x": None}] * 7 + [good]
        assert sorted(errors) == [1, 2, 3, 4, 5, 6, 7]
        assert errors[1].startswith(f"{path}:2: malformed JSON: ")
        assert errors[2] == f"{path}:3: a row must be a JSON object, this one is a list"
        assert errors[3].endswith("is null")
        assert "surrogate" in errors[5]

    def test_nan_and_infinity_are_read(self, tmp_path):
        """Lines with NaN and Infinity, as Python writes them, are valid."""
        rows = [b'{"a":NaN,"b":1}', b'{"a":0.5,"b":-Infinity}', b'{"a":[Infinity,"NaN"]}', b'{"b":2,"c":1e400}']
        rows += [b'{"c":%s}' % (b"7" * 400), b'{"a":NaN,"c":"\\ud800"}', b'{"a":NaN', b'{"a":"\xff","c":NaN}']
        inputs = scan_all(write_lines(tmp_path / "a.jsonl", rows))
        found, errors = read_all(inputs)
        assert sorted(errors) == [5, 6, 7]
        assert [repr(row["a"]) for row in found[:3]] == ["nan", "0.5", "[inf, 'NaN']"]
        assert [repr(row["b"]) for row in found[:4]] == ["1", "-inf", "None", "2"]
        assert [repr(row["c"]) for row in found[2:4]] == ["None", "inf"] and found[4]["c"] == int("7" * 400)

    def test_nan_in_a_double_column_is_a_double(self, tmp_path):
        inputs = scan_all(write_lines(tmp_path / "a.jsonl", [b'{"a":NaN}', b'{"a":0.5}']))
        assert inputs.schema.field("a").type == pa.float64() and not inputs.text_json

    @pytest.mark.parametrize("depth", [200, 300, 900, 1020, 5000])
    def test_nesting_of_any_depth_is_a_value_or_a_row_error(self, tmp_path, depth):
        deep = b"[" * depth + b"%s" + b"]" * depth
        rows = [b'{"x":%s}' % (deep % inner) for inner in (b"1", b"NaN", b"1" * 30)] + [{"x": [1]}]
        found, errors = read_all(scan_all(write_lines(tmp_path / "a.jsonl", rows)))
        assert found[3] == {"x": [1]} and 3 not in errors
        assert all((row["x"] is None) == (place in errors) for place, row in enumerate(found))

    def test_error_names_the_line_number_despite_blank_lines(self, tmp_path):
        rows = [{"x": i} for i in range(10)]
        rows[6] = b'{"x": 6'
        path = write_lines(tmp_path / "a.jsonl", [b"", rows[0], b"  \t", *rows[1:]], end="\r\n")
        inputs = scan_all(path)
        assert inputs.files[0].rows == 10
        found, errors = read_all(inputs)
        assert [row["x"] for row in found] == [0, 1, 2, 3, 4, 5, None, 7, 8, 9]
        assert list(errors) == [6]
        assert errors[6].startswith(f"{path}:9: malformed JSON")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_line_over_the_length_limit_is_a_row_error(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(lines, "MAX_LINE_BYTES", 5000)
        monkeypatch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", 700)
        rows = [{"x": "a"}, {"x": "b" * 20_000}, {"x": "c" * 4900}, {"x": "d" * 30_000}]
        inputs = scan_all(write_lines(tmp_path / f"a.{suffix}", rows))
        found, errors = read_all(inputs)
        assert [row["x"] for row in found] == ["a", None, "c" * 4900, None]
        assert sorted(errors) == [1, 3]
        assert "a." in errors[1] and ":2: row is longer than" in errors[1]

    def test_line_longer_than_a_block_is_read(self, tmp_path):
        rows = [{"x": "é" * 600_000}, {"x": "short"}, {"x": "b" * 9_000_000}]
        assert read_all(scan_all(write_lines(tmp_path / "a.jsonl", rows)))[0] == rows

    def test_utf8_mark_is_skipped_and_utf16_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"x":1}\n{"x":2}')
        assert read_all(scan_all(tmp_path / "a.jsonl")) == ([{"x": 1}, {"x": 2}], {})
        (tmp_path / "b.jsonl").write_text('{"x":1}', encoding="utf-16")
        with pytest.raises(InputError, match=r"b\.jsonl: is UTF-16"):
            scan_all(tmp_path / "b.jsonl")

    def test_file_without_objects_is_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("id,text\n1,hello\n")
        with pytest.raises(InputError, match="no row is a JSON object; line 1: malformed JSON"):
            scan_all(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("suffix", SUFFIXES[1:])
    def test_truncated_or_damaged_compression_is_an_error(self, tmp_path, suffix):
        data = compress(suffix, b"".join(b'{"x":%d,"y":"%d"}\n' % (i, i * 7919) for i in range(20_000)))
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="the file is truncated"):
            scan_all(path)
        path.write_bytes(data[:1000] + bytes(1000) + data[2000:])
        with pytest.raises(InputError, match=r"damaged|truncated|no line"):
            scan_all(path)

    def test_compression_is_detected_by_content_not_name(self, tmp_path):
        for kind in (".gz", ".zst"):
            path = tmp_path / f"odd{kind}.jsonl"
            path.write_bytes(compress(kind, b'{"x":1}\n{"x"') + compress(kind, b':2}\n{"x":3}'))
            assert [row["x"] for row in read_all(scan_all(path))[0]] == [1, 2, 3]

    def test_decompression_bomb_uses_bounded_memory(self, tmp_path):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"x":1}\n' + b" " * 70_000_000 + b"\n" + b'{"x":2}\n'))
        found, errors = read_all(scan_all(path))
        assert [row["x"] for row in found] == [1, None, 2]
        assert list(errors) == [1]

    def test_file_with_too_many_keys_is_refused(self, tmp_path):
        path = write_lines(tmp_path / "a.jsonl", [{f"k{i}": 1} for i in range(10_001)])
        with pytest.raises(InputError, match="different keys"):
            scan_all(path)

    def test_deep_nesting_is_a_row_error(self, tmp_path):
        rows = [{"x": [1]}, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
        assert list(read_all(scan_all(write_lines(tmp_path / "a.jsonl", rows)))[1]) == [1]


class TestSeeking:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_rows_do_not_depend_on_spans(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(jsonl, "INDEX_ROWS", 100)
        rows = [{"i": i, "t": "ü" * (i % 50)} for i in range(3000)]
        mixed = [line for i, row in enumerate(rows) for line in ([b"", row] if i % 7 == 0 else [row])]
        inputs = scan_all(write_lines(tmp_path / f"a.{suffix}", mixed, end="\r\n"))
        assert len(inputs.files[0].index) == (29 if suffix == "jsonl" else 0)
        spans = [RowSpan(0, 5, 10), RowSpan(0, 15, 80), RowSpan(0, 1234, 1), RowSpan(0, 1235, 500), RowSpan(0, 2999, 1)]
        found, _ = read_all(inputs, spans)
        assert found == [row for span in spans for row in rows[span.start : span.start + span.count]]

    def test_seek_does_not_read_skipped_bytes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jsonl, "INDEX_ROWS", 100)
        monkeypatch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", 10_000)
        inputs = scan_all(write_lines(tmp_path / "a.jsonl", [{"i": i, "t": "x" * 1000} for i in range(2000)]))
        read, real = [], LocalSource.read_at
        monkeypatch.setattr(
            "batchinfer.io.source.LocalSource.read_at",
            lambda self, offset, length: read.append(length) or real(self, offset, length),
        )
        read_all(inputs, [RowSpan(0, 1990, 10)])
        assert sum(read) < 150_000

    def test_line_numbers_are_right_after_a_seek(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jsonl, "INDEX_ROWS", 10)
        rows = [{"i": i} for i in range(50)]
        rows[45] = b"{"
        path = write_lines(tmp_path / "a.jsonl", [b"", b"", *rows])
        _, errors = read_all(scan_all(path), [RowSpan(0, 44, 3)])
        assert errors[1].startswith(f"{path}:48:")


class TestBatchLines:
    def test_batch_request_lines_are_validated(self, tmp_path):
        good = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [], "n": 10**25},
        }
        rows = [
            good,
            {"custom_id": 7, "body": {}},
            {"custom_id": "b", "body": "text"},
            b"{",
            {"custom_id": "a", "body": {}},
            {"custom_id": "", "body": {}},
            {"custom_id": 10**20, "body": {}},
            {"custom_id": [1.5, None], "body": {}},
            {"custom_id": None, "body": {}},
        ]
        path = write_lines(tmp_path / "a.jsonl", rows)
        inputs = scan_all(path, format="openai-batch")
        assert inputs.schema.names == ["custom_id", "method", "url", "body"]
        assert inputs.text_json == {"body"}
        [(_, batch)] = stream_rows(inputs, [RowSpan(0, 0, 9)], LOCAL)
        assert json.loads(batch.table["body"][0].as_py()) == good["body"]
        assert {i: str(e).removeprefix(path) for i, e in batch.errors.items() if i != 3} == {
            1: ":2: custom_id must be a string",
            2: ":3: body must be a JSON object",
            4: ":5: custom_id 'a' is already used on line 1",
            5: ":6: custom_id is empty",
            6: ":7: custom_id must be a string",
            7: ":8: custom_id must be a string",
            8: ":9: custom_id must be a string",
        }
        ids = ["a", "7", "b", None, "a", "", "100000000000000000000", "[1.5,null]", None]
        assert batch.table["custom_id"].to_pylist() == ids
        assert Inputs.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs
        assert all(isinstance(error, InvalidInput) for error in batch.errors.values())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.lists(st.dictionaries(st.sampled_from("abc"), values, max_size=3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=objects, suffix=st.sampled_from(SUFFIXES), compression=st.sampled_from([None, "gzip", "zstd"]))
def test_written_lines_read_back_equal(tmp_path, rows, suffix, compression):
    """Any JSON object reads back equal, absent keys as null."""
    source = write_lines(tmp_path / f"in.{suffix}", rows)
    inputs = scan_all(source)
    [(_, batch)] = stream_rows(inputs, [RowSpan(0, 0, len(rows))], LOCAL)
    assert batch.errors == {}
    assert batch.table.num_rows == len(rows)
    assume(inputs.schema.names)  # a table without columns has no lines to write
    out = tmp_path / "out"
    write_rows(out, batch.table, "jsonl", compression, inputs.text_json)
    again = scan_all(out, format="jsonl")
    names = inputs.schema.names
    assert _plain(again) == [{name: row.get(name) for name in names} for row in rows]


numbers = st.integers(-(2**70), 2**70) | st.floats() | st.integers(-9, 9) | st.sampled_from([1.0, 1e22, -0.0, 2**53])
cells = numbers | values | st.lists(numbers, max_size=2)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("ab"), cells, min_size=1), min_size=2, max_size=6), cut=st.integers(1)
)
def test_row_value_does_not_depend_on_other_lines_and_files(tmp_path, rows, cut):
    """Each row equals the row read alone, including the type of each number."""
    cut = 1 + cut % (len(rows) - 1)
    together = scan_all(write_lines(tmp_path / "all.jsonl", rows))
    inputs = [together]
    with contextlib.suppress(InputError):  # some columns differ too much between files
        inputs.append(
            scan_all(*(write_lines(tmp_path / f"{i}.jsonl", r) for i, r in enumerate((rows[:cut], rows[cut:]))))
        )
    for found in inputs:
        read, errors = read_all(found)
        assert errors == {}
        assert list(map(_repr, read)) == [_repr({name: row.get(name) for name in found.schema.names}) for row in rows]


def _repr(row):
    return repr(sorted(row.items()))


def _plain(inputs):
    """Parse rows with Python's own parser, which keeps every digit."""
    found = []
    for _, batch in stream_rows(inputs, [RowSpan(0, 0, inputs.files[0].rows)], LOCAL):
        for row in batch.table.to_pylist():
            json_text = {name: json.loads(row[name]) for name in inputs.text_json if row[name] is not None}
            found.append(row | json_text)
    return found


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from([b'{"x":1}', b"", b"  ", b"\r", b"{", b'{"x":"' + b"y" * 90 + b'"}']), max_size=40),
    block=st.integers(1, 200),
)
def test_lines_do_not_depend_on_block_size(tmp_path, pieces, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "MAX_LINE_BYTES", 60)
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join(pieces))
        wanted = _lines_of(path)
        patch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", block)
        assert _lines_of(path) == wanted
    offset, expected = 0, []
    for number, piece in enumerate(pieces, 1):
        if piece.strip():
            expected.append((number, offset, piece if len(piece) <= 60 else None))
        offset += len(piece) + 1
    assert wanted == expected


def _lines_of(path):
    with Sources(LOCAL).open(str(path)) as source:
        return [tuple(line[:3]) for block in lines.read_lines(source) for line in block]


def test_written_bytes_do_not_depend_on_time(tmp_path, monkeypatch):
    table = pa.table({"a": ["x", None], "j": ['{"k":[1, 2]}', "7"], "b": [b"\x00\xff", None], "f": [float("nan"), 0.5]})
    written = {}
    for compression in (None, "none", "gzip", "zstd"):
        for i in range(2):
            monkeypatch.setattr(time, "time", lambda i=i: 1e9 * (i + 1))
            write_rows(tmp_path / f"{i}", table, "jsonl", compression, {"j"})
        assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
        written[compression] = (tmp_path / "0").read_bytes()
    assert written[None] == written["none"]
    assert gzip.decompress(written["gzip"]) == written[None]
    assert written[None].splitlines()[0] == b'{"a":"x","j":{"k":[1, 2]},"b":"AP8=","f":null}'


def test_lines_and_parquet_unify(tmp_path):
    a = write_parquet(tmp_path / "a.parquet", pa.table({"x": [1, 2], "t": ["p", "q"]}))
    b = write_lines(tmp_path / "b.jsonl", [{"t": "r", "x": 3}])
    assert [row["x"] for row in read_all(scan_all(a, b))[0]] == [1, 2, 3]


def test_printable_text_is_unchanged(tmp_path):
    rows = [{"x": string.printable}, {"x": "\u2028\u0000\U0001f600"}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    assert read_all(scan_all(path))[0] == rows
