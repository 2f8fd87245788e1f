"""Cells of awkward types through a whole job: what prompts say of them, and what parts hold."""

import decimal
import re
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import SpecError
from batchinfer.job.part_reader import read_part
from tests.job.doubles import ScriptedLLM, job, rows_of_output, run

ZONED = pa.timestamp("us", "Mars/Phobos")


def prompts(tmp_path, table, template, **sections):
    """Return each row's template text or error, and the output's rows as `show` and `verify` read them."""
    pq.write_table(table, tmp_path / "in.parquet")
    llm = ScriptedLLM()
    spec = job(tmp_path, prompt={"template": template}, **sections)
    run(spec, llm)
    texts = [prompt.contents[0] if prompt.error is None else str(prompt.error) for prompt in llm.seen]
    parts = sorted(Path(spec.output.path, "parts").iterdir())
    return texts, [row for part in parts for row in read_part(part.read_bytes(), part.name)]


def times(unit="ns"):
    """Two times that every reader takes, and between them one whose year Python does not have."""
    far = {"ns": 2**63 - 1, "us": 10**18, "s": 10**12}[unit]
    near = {"ns": 10**18 + 7, "us": 10**15 + 7, "s": 10**9}[unit]
    return pa.array([near, far, None, near], pa.timestamp(unit))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_no_cell_that_is_carried_ends_a_job(tmp_path, form):
    table = pa.table(
        {
            "text": ["a", "b", "c", "d"],
            "us": times("us"),
            "nested": pa.array([[2**62], [1], None, []], pa.list_(pa.timestamp("ns"))),
            "zone": pa.array([0, 1, None, 2], ZONED),
            "struct": pa.array([{"at": 10**18}, {"at": 0}, None, {"at": None}], pa.struct({"at": ZONED})),
            "map": pa.array([[("a", 1)], None, [], [("b", None)]], pa.map_(pa.string(), pa.duration("ns"))),
            "json": pa.array(['{"a": 1}', "{", None, "[\n1]"], pa.json_()),
            "uuid": pa.array([b"0123456789abcdef", None, None, b"\xff" * 16], pa.uuid()),
        }
    )
    texts, rows = prompts(tmp_path, table, "{{ text }}", output={"format": form})
    assert texts == ["a", "b", "c", "d"] and {row["status"] for row in rows} == {"ok"}
    if form == "jsonl":
        assert rows[1]["us"] == "+33658-09-27T01:46:40" and rows[0]["us"] == "2001-09-09T01:46:40.000007"
        assert rows[0]["nested"] == ["2116-02-20T23:53:38.427387904"]
        assert [row["zone"] for row in rows[:2]] == ["1970-01-01T00:00:00+00:00", "1970-01-01T00:00:00.000001+00:00"]
        assert [row["struct"] for row in rows] == [
            {"at": "+33658-09-27T01:46:40+00:00"},
            {"at": rows[0]["zone"]},
            None,
            {},
        ]
        assert [row["map"] for row in rows] == [{"a": "PT0.000000001S"}, None, {}, {"b": None}]
        assert [row["uuid"] for row in rows] == [
            "30313233-3435-3637-3839-616263646566",
            None,
            None,
            "f" * 8 + "-ffff" * 3 + "-" + "f" * 12,
        ]
        assert [row["json"] for row in rows] == [{"a": 1}, "{", None, [1]]
    else:
        part = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out" / "parts").iterdir()))
        for name in ("us", "nested", "zone", "struct", "map"):
            assert part.column(name).equals(table.column(name)), name


def test_int96_has_the_years_of_a_calendar(tmp_path):
    table = pa.table({"text": ["a", "b"], "to": pa.array([253402214400, -62135596800], pa.timestamp("s"))})
    pq.write_table(
        table.cast(pa.schema({"text": pa.string(), "to": pa.timestamp("us")})),
        tmp_path / "in.parquet",
        use_deprecated_int96_timestamps=True,
    )
    llm = ScriptedLLM()
    run(job(tmp_path, prompt={"template": "{{ to.date() }}"}, output={"format": "jsonl"}), llm)
    assert [prompt.contents[0] for prompt in llm.seen] == ["9999-12-31", "0001-01-01"]
    assert [row["to"] for row in rows_of_output(tmp_path / "out")] == ["9999-12-31T00:00:00", "0001-01-01T00:00:00"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.map_(pa.string(), pa.float64()),
        pa.map_(pa.string(), pa.decimal128(9, 2)),
        pa.struct({"temperature": pa.decimal128(9, 2)}),
    ],
)
def test_overrides_are_maps_and_structs_of_any_number(tmp_path, kind):
    decimals = "decimal" in str(kind)
    half = decimal.Decimal("0.50") if decimals else 0.5
    given = [{"temperature": half} if pa.types.is_struct(kind) else [("temperature", half)], None]
    table = pa.table({"text": ["a", "b"], "over": pa.array(given, kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, sampling={"column": "over"}), llm)
    assert [prompt.params and prompt.params.temperature for prompt in llm.seen] == [0.5, None]


def test_messages_leave_out_what_other_rows_have(tmp_path):
    calls = [
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Ulm"}}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"day": "Mon"}}}]}],
    ]
    pq.write_table(pa.table({"messages": calls}), tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, prompt={"template": None, "messages": "messages"}, output={"format": "jsonl"}), llm)
    assert [prompt.contents[0][0]["tool_calls"] for prompt in llm.seen] == [call[0]["tool_calls"] for call in calls]
    assert [row["messages"] for row in rows_of_output(tmp_path / "out")] == calls


ODD = {"Review Text": ["a"], "user-id": [1], "meta.lang": ["en"], "not": ["x"], "2x": [2]}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ Review Text }}", "Review Text"),
        ("{{ meta.lang }}", "meta.lang"),
        ("{{ user-id }}", "user-id"),
        ("{{ 2x }}", "2x"),
        ("{{ not }}", "not"),
    ],
)
def test_a_name_that_jinja_cannot_read_is_told_how_to_be_written(tmp_path, template, name):
    with pytest.raises(SpecError, match=re.escape(f"the column {name!r} is written row[{name!r}]")) as caught:
        prompts(tmp_path, pa.table(ODD), template)
    assert caught.value.key == "prompt.template"
    texts, _ = prompts(tmp_path, pa.table(ODD), f"{{{{ row[{name!r}] }}}}")
    assert texts == [str(ODD[name][0])]
    with pytest.raises(SpecError, match=r"prompt\.template: line 1: [^;]*$"):
        prompts(tmp_path, pa.table(ODD), "{{ a b }}")


def test_row_reads_what_it_needs_and_no_more(tmp_path):
    table = pa.table({"a-b": [1], "c": ["x"], "far": pa.array([10**18], pa.timestamp("us"))})
    texts, _ = prompts(tmp_path, table, "{{ row['a-b'] }}", input={"columns": ["c"], "where": "row['a-b'] == 1"})
    assert texts == ["1"]
    texts, rows = prompts(
        tmp_path,
        table.select(["a-b", "c"]),
        "{{ row | tojson }}",
        input={"columns": ["a-b"]},
        output={"path": str(tmp_path / "o")},
    )
    assert texts == ['{"a-b": 1, "c": "x"}'] and "c" not in rows[0]


def test_a_value_that_is_used_and_not_held_is_its_rows_error(tmp_path):
    table = pa.table(
        {
            "at": pa.array([0, 10**18, 5], pa.timestamp("us")),
            "zone": pa.array([0, 1, 2], ZONED),
            "raw": [b"ok", b"\xff", "ä".encode()],
            "score": [1.0, float("nan"), float("inf")],
        }
    )
    for number, (template, texts) in enumerate(
        {
            "{{ at }}": ["1970-01-01T00:00:00", "beyond the years 1 to 9999", "1970-01-01T00:00:00.000005"],
            "{{ zone }}": ["time zone 'Mars/Phobos' is not known"] * 3,
            "{{ raw }}": ["ok", "not UTF-8", "ä"],
            "{{ score }}": ["1.0", "column 'score' is NaN", "column 'score' is infinite"],
        }.items()
    ):
        found, _ = prompts(
            tmp_path, table, template, errors={"max": "100%"}, output={"path": str(tmp_path / f"out{number}")}
        )
        assert all(text in given for text, given in zip(texts, found, strict=True)), found


@pytest.mark.parametrize("key", ["column", "messages"])
@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_columns_of_text_in_any_form(tmp_path, key, kind):
    text = '[{"role": "user", "content": "hi"}]'
    pq.write_table(pa.table({"x": pa.array([text], kind), "text": ["a"]}), tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, prompt={"template": None, key: "x"}), llm)
    assert [prompt.contents[0] for prompt in llm.seen] == [
        text if key == "column" else [{"role": "user", "content": "hi"}]
    ]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_intervals_of_parquet_are_text(tmp_path, monkeypatch, form):
    """DuckDB writes them, and pyarrow does not: what says that a column is one stands in for the file."""
    cells = [struct.pack("<III", 14, 3, 4500), None, struct.pack("<III", 0, 0, 0)]
    monkeypatch.setattr("batchinfer.io.parquet._intervals", lambda parquet: frozenset({"iv"}))
    table = pa.table({"text": ["a", "b", "c"], "iv": pa.array(cells, pa.binary(12))})
    texts, rows = prompts(tmp_path, table, "{{ text }} {{ iv or '-' }}", output={"format": form})
    assert texts == ["a P1Y2M3DT4.5S", "b -", "c PT0S"] and [row["iv"] for row in rows] == [
        "P1Y2M3DT4.5S",
        None,
        "PT0S",
    ]
