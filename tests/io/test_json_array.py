"""Tests of files that are one JSON array: read like lines in any layout, and refused with the element if malformed."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError
from batchinfer.io import json_array, jsonl, lines
from batchinfer.io.rows import RowSpan
from tests.io.reading import compress, read_all, scan_all

SUFFIXES = ("json", "jsonl", "json.gz", "json.zst")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text('"\\[]{},: \né', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
rows_of_any_kind = st.lists(st.dictionaries(st.sampled_from("abc"), values, max_size=3), min_size=1, max_size=8)


def write(path, text):
    path.write_bytes(compress(path.name, text if isinstance(text, bytes) else text.encode()))
    return path


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of_any_kind,
    suffix=st.sampled_from(SUFFIXES),
    indent=st.sampled_from([None, 0, 2]),
    mark=st.booleans(),
    ascii_=st.booleans(),
    block=st.integers(1, 100),
)
def test_array_reads_like_the_same_rows_as_lines(tmp_path, rows, suffix, indent, mark, ascii_, block):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_)
    array = write(tmp_path / f"a.{suffix}", ("\ufeff" if mark else "") + text + "\n" * (block % 3))
    plain = write(tmp_path / "b.jsonl", "\n".join(json.dumps(row) for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", block)
        inputs, wanted = scan_all(array), scan_all(plain)
        assert inputs.schema == wanted.schema and inputs.text_json == wanted.text_json
        assert read_all(inputs) == read_all(wanted)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_any_kind, indent=st.sampled_from([None, 2]), data=st.data())
def test_truncated_array_is_an_error(tmp_path, rows, indent, data):
    text = json.dumps(rows, indent=indent)
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(InputError):
        scan_all(write(tmp_path / "a.json", text[:cut]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": 2}', r"json:1: the array is not closed: the file ends before element \[2\]"),
        (
            '[\n{"a": 1},\n{"a": "x',
            r"json:3: the array is not closed: the file ends in element \[1\], which begins here",
        ),
        ("[", r"ends before element \[0\]"),
        ('[{"a": 1},]', r"element \[1\] is missing: the array ends after a comma"),
        ('[{"a": 1},\n, {"a": 2}]', r"json:2: element \[1\] is missing: found ',' instead"),
        ('[{"a": 1}\n{"a": 2}]', r"json:2: a comma is missing before element \[1\]"),
        ('[\n{"a": 1}]\n]', r"json:3: text follows the end of the array"),
        ('[{"a": 1}] {"a": 2}', "json:1: text follows the end of the array"),
        ('["a", "b"]', r"no row is a JSON object; line 1, element \[0\]: .* this one is a string"),
        ("[\n1,\n2\n]", r"line 2, element \[0\]: .* this one is 1"),
        ('[[{"a": 1}]]', r"line 1, element \[0\]: .* this one is a list"),
        ('{\n  "a": 1,\n  "b": [1]\n}', "contains an object over several lines"),
        ('{\n  "data": [\n    {"a": 1}\n  ]\n}', "contains an object over several lines"),
    ],
)
def test_malformed_array_is_refused_with_element_number(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        scan_all(write(tmp_path / "a.json", text))


def test_invalid_element_is_a_row_error(tmp_path):
    text = '[\n  {"a": 1},\n  "x",\n  {"a": tru},\n  {\n    "a": 4,\n    5\n  },\n  {"a": 6}\n]'
    rows, errors = read_all(scan_all(write(tmp_path / "a.json", text)))
    assert [row["a"] for row in rows] == [1, None, None, None, 6]
    assert "json:3, element [1]: a row must be a JSON object, this one is a string" in errors[1]
    assert "json:4, element [2]: malformed JSON" in errors[2]
    assert "json:5, element [3]: malformed JSON" in errors[3] and "line 3 of it" in errors[3]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('[{"a": 1}]\n{"a": 2}\n', [None, 2]),
        ('[2024-01-01] started\n{"a": 2}\n', [None, 2]),
        ('[]\n{"a": 2}\n', [None, 2]),
        ('{\n{"a": 2}\n', [None, 2]),
        ('\n[1, 2]\n{"a": 2}\n[3]', [None, 2, None]),
    ],
)
def test_lines_with_lists_are_not_one_array(tmp_path, text, rows):
    assert [row["a"] for row in read_all(scan_all(write(tmp_path / "a.jsonl", text)))[0]] == rows


def test_empty_array_has_no_rows(tmp_path):
    for text in ("[]", " [\n]\n", "[ ]"):
        assert scan_all(write(tmp_path / "a.json", text)).files[0].rows == 0


@pytest.mark.parametrize("indent", [None, 1])
def test_seek_into_array_gives_the_same_rows(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(jsonl, "INDEX_ROWS", 10)
    monkeypatch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", 500)
    rows = [{"i": i, "t": {"x": ["é" * (i % 7)]}} for i in range(200)]
    rows[150] = "no object"
    inputs = scan_all(write(tmp_path / "a.json", "\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False)))
    assert len(inputs.files[0].index) == 19
    spans = [RowSpan(0, 3, 2), RowSpan(0, 97, 4), RowSpan(0, 150, 1), RowSpan(0, 199, 1)]
    found, errors = read_all(inputs, spans)
    assert [row["i"] for row in found] == [3, 4, 97, 98, 99, 100, None, 199]
    assert "element [150]" in errors[6] and (indent is None) == (":1," in errors[6])


def test_element_over_the_length_limit_is_a_row_error(tmp_path, monkeypatch):
    for module in (lines, json_array):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("batchinfer.io.source._SEQUENTIAL_BYTES", 700)
    rows = [{"x": "a"}, {"x": 'b\\"\n' * 9000}, {"x": ["c" * 20] * 1000}, {"x": "c" * 4900}, {"x": ["d\n" * 3000]}]
    inputs = scan_all(write(tmp_path / "a.json", json.dumps(rows, indent=1)))
    found, errors = read_all(inputs)
    assert [row["x"] for row in found] == ["a", None, None, "c" * 4900, None]
    assert sorted(errors) == [1, 2, 4]
    assert ":1015, element [4]: row is longer" in errors[4]
