"""Tests of Hive-style partition columns: values and types, beside own columns, on disk and object storage."""

import json
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import OutputConflict
from batchinfer.io.partitions import partition_values
from batchinfer.io.rows import InputFile, Inputs, stream_rows
from batchinfer.job.inspect.verify import audit
from batchinfer.spec import StorageSpec
from tests.io.reading import LOCAL, read_all, scan_all, spans_of, write_lines
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run


def write(folder, **texts):
    """Write one Parquet file per folder name, given as keyword arguments with `_` for the first "="."""
    for name, text in texts.items():
        write_at(folder / name.replace("_", "=", 1), text)


def write_at(folder, *texts):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), folder / "part-0.parquet")


def test_partition_values_are_decoded_from_the_path():
    assert partition_values("data/lang=de/part-0.parquet") == (("lang", "de"),)
    assert partition_values("b/a=1/x/b=c=d/f.parquet") == (("a", "1"), ("b", "c=d"))
    assert partition_values("a=1/b=2/a=3/f.parquet") == (("a", "3"), ("b", "2"))
    assert partition_values("t/at=2024-01-01%2000%3A00/%20=%25/f") == (("at", "2024-01-01 00:00"), (" ", "%"))
    assert partition_values("k=__HIVE_DEFAULT_PARTITION__/j=/f") == (("k", None), ("j", None))
    assert partition_values("=1/k/f=1.jsonl") == ()


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1), max_size=4))
def test_any_key_and_value_round_trips(pairs):
    path = "/".join([*(f"{quote(key, '')}={quote(value, '')}" for key, value in pairs.items()), "f"])
    assert dict(partition_values(path)) == pairs


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "-2"], [1, -2]),
        (["01", "12"], [1, 12]),
        (["1", "x"], ["1", "x"]),
        (["1", "1.5"], ["1", "1.5"]),
        (["1", "__HIVE_DEFAULT_PARTITION__"], [1, None]),
        (["9223372036854775807", "1"], [2**63 - 1, 1]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["__HIVE_DEFAULT_PARTITION__"], [None]),
        (["١"], ["١"]),
    ],
)
def test_partition_column_type_follows_its_values(tmp_path, values, expected):
    for number, value in enumerate(values):
        write_at(tmp_path / f"n={number}" / f"k={value}", "t")
    inputs = scan_all(tmp_path)
    assert inputs.schema.names == ["text", "n", "k"]
    assert [row["k"] for row in read_all(inputs)[0]] == expected
    assert Inputs.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs


def test_partition_columns_do_not_depend_on_how_files_are_named(tmp_path, monkeypatch):
    write(tmp_path / "data", lang_de="a", lang_fr="b")
    rows = [{"text": "a", "lang": "de"}, {"text": "b", "lang": "fr"}]
    files = [str(tmp_path / f"data/lang={lang}/part-0.parquet") for lang in ("de", "fr")]
    url = (tmp_path / "data").as_uri()
    for paths in ([tmp_path / "data"], [tmp_path / "data/*/*.parquet"], [tmp_path / "data/lang=*"], files, [url]):
        assert read_all(scan_all(*paths))[0] == rows
    assert read_all(scan_all(tmp_path / "data/lang=fr"))[0] == rows[1:]
    monkeypatch.chdir(tmp_path / "data" / "lang=de")
    assert read_all(scan_all("part-0.parquet"))[0] == [{"text": "a"}]


def test_partitions_on_object_storage_are_columns(tmp_path):
    filesystem = fsspec.filesystem("memory")
    for key in ("at=2024%3A01/lang=de", "at=2024%3A02/lang=fr"):
        filesystem.pipe_file(f"/{tmp_path.name}/{key}/a.jsonl", b'{"text": "x"}\n')
    for pattern in (f"memory://{tmp_path.name}", f"memory://{tmp_path.name}/**/*.jsonl"):
        rows = read_all(scan_all(pattern))[0]
        assert [(row["at"], row["lang"]) for row in rows] == [("2024:01", "de"), ("2024:02", "fr")]


def test_own_column_wins_over_partition(tmp_path, capsys):
    for lang in ("de", "fr"):
        (tmp_path / f"lang={lang}").mkdir()
        write_lines(tmp_path / f"lang={lang}" / "a.jsonl", [{"lang": "own"}, {"lang": None}])
    assert [row["lang"] for row in read_all(scan_all(tmp_path))[0]] == ["own", None] * 2
    assert "lang" in capsys.readouterr().err


def test_file_outside_partition_folders_has_null(tmp_path, capsys):
    write(tmp_path, k_1="a")
    write_at(tmp_path, "b")
    assert [row["k"] for row in read_all(scan_all(tmp_path))[0]] == [1, None]
    assert "no folder that names these columns" in capsys.readouterr().err


def test_partition_columns_follow_selection_and_spans(tmp_path):
    for k in (1, 2):
        write_at(tmp_path / f"k={k}", *"abcdefg")
    inputs = scan_all(tmp_path)
    for columns in (["k"], ["text"], ["k", "text"], []):
        batches = [batch.table for _, batch in stream_rows(inputs.select(columns), spans_of(inputs, 3), LOCAL)]
        assert [table.num_rows for table in batches] == [3, 3, 1] * 2
        assert all(set(table.schema.names) == set(columns) for table in batches)


def test_job_carries_partition_columns(tmp_path):
    write(tmp_path / "data", lang_de="a", lang_fr="b", lang_it="c")
    sections = {"input": {"path": str(tmp_path / "data"), "where": "lang != 'fr'"}}
    spec = job(tmp_path, prompt={"template": "{{ lang }} {{ text }}"}, **sections)
    run(spec, ScriptedLLM())
    rows = pq.read_table(tmp_path / "out" / "parts").to_pylist()
    assert [(row["lang"], row["response"]) for row in rows] == [("de", "de a!"), ("it", "it c!")]
    assert audit(str(tmp_path / "out"), StorageSpec()).differences == []


def test_changed_partition_value_is_another_input(tmp_path):
    write(tmp_path / "data", lang_de="a", lang_fr="b")
    store = MemoryStore()
    run(job(tmp_path, input={"path": str(tmp_path / "data")}), ScriptedLLM(), store)
    (tmp_path / "data" / "lang=fr").rename(tmp_path / "data" / "lang=gr")
    with pytest.raises(OutputConflict, match=r"is of partition .*gr.*, and was of .*fr"):
        run(job(tmp_path, input={"path": str(tmp_path / "data")}), ScriptedLLM(), store)
    (tmp_path / "data" / "lang=gr").rename(tmp_path / "data" / "lang=fr")
    (tmp_path / "data").rename(tmp_path / "moved")
    run(job(tmp_path, input={"path": str(tmp_path / "moved/*/*")}), ScriptedLLM(), store)


def test_plan_without_partitions_omits_the_key():
    assert "partitions" not in InputFile("a", "jsonl", 1, "x", 1).to_dict()
