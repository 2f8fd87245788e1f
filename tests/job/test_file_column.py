"""A column with the input file of each row, in every form of output, and the same after whatever happens to a job."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from batchinfer.errors import EngineFailure, OutputConflict, SpecError
from batchinfer.job.inspect.show import pick
from batchinfer.job.inspect.verify import audit
from batchinfer.job.ledger import open_output
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from batchinfer.spec import StorageSpec
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run


@pytest.fixture
def paths(tmp_path):
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ba"]
    for path in paths:
        write(path)
    return paths


def write(path, rows=6):
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(json.dumps({"text": f"t{n}"}) + "\n" for n in range(rows))


def rows_of(tmp_path):
    folder = tmp_path / "out" / "parts"
    rows = []
    for part in sorted(folder.iterdir()):
        lines = part.suffix == ".jsonl"
        rows += list(map(json.loads, part.read_text().splitlines())) if lines else pq.read_table(part).to_pylist()
    return rows


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("output", "column"),
    [({}, "source"), ({"prefix": "row_"}, "row"), ({"prefix": "x"}, "xfile"), ({"samples": "rows"}, "file")],
)
def test_every_row_says_its_file(tmp_path, paths, form, output, column):
    sections = {"input": {"path": paths, "where": "text != 't3'"}, "sampling": {"max_tokens": 8, "n": 2}}
    run(job(tmp_path, output={"file_column": column, "format": form, **output}, **sections))
    rows = rows_of(tmp_path)
    number = output.get("prefix", "") + "row"
    samples = 2 if "samples" in output else 1
    wanted = [(path, n) for path in paths for n in (0, 1, 2, 4, 5) for _ in range(samples)]
    assert [(row[column], row[number]) for row in rows] == wanted
    assert [row["text"] for row in rows] == [f"t{n}" for _, n in wanted]
    assert list(rows[0])[:3] == ["text", column, number]
    assert audit(str(tmp_path / "out"), StorageSpec()).differences == []


def test_retry_and_show_keep_it(tmp_path, paths):
    def fail(prompt):
        return EngineFailure("once") if prompt.index in (1, 7) else None

    spec = job(tmp_path, input={"path": paths}, output={"file_column": "row", "prefix": "m_"})
    run(spec, ScriptedLLM(fail))
    run(spec, ScriptedLLM(), job=retry_job)
    rows = rows_of(tmp_path)
    assert [(row["row"], row["m_row"], row["m_status"]) for row in rows] == [
        (path, n, "ok") for path in paths for n in range(6)
    ]
    assert audit(str(tmp_path / "out"), StorageSpec()).differences == []
    shown = pick(open_output(str(tmp_path / "out"), StorageSpec()), StorageSpec(), 1, row=2)[0]
    assert (shown.row, shown.input) == (2, {"text": "t2", "row": paths[0]})


def test_workers_with_copies_give_the_plan_s_names(tmp_path):
    store = MemoryStore()
    for number in range(2):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        write(folder / "a.jsonl", 8)
        spec = job(tmp_path, input={"path": str(folder)}, output={"file_column": "file", "format": "jsonl"})
        run(spec, ScriptedLLM(), store, shard=Shard(number, 2))
    parts = [data for name, data in store.objects.items() if name.startswith("parts/")]
    assert {json.loads(line)["file"] for data in parts for line in data.splitlines()} == {
        str(tmp_path / "node0" / "a.jsonl")
    }


def test_what_it_cannot_be(tmp_path, paths):
    for output, said in (
        ({"file_column": "text"}, "has a column 'text' already"),
        ({"file_column": "status"}, "has a column 'status' already"),
        ({"file_column": ""}, "output.file_column"),
    ):
        with pytest.raises(SpecError, match=said):
            run(job(tmp_path, input={"path": paths}, output=output), ScriptedLLM())
    batch = {"input": {"path": paths, "format": "openai-batch"}, "prompt": None}
    with pytest.raises(SpecError, match=r"output\.file_column: lines of openai-batch"):
        run(job(tmp_path, output={"file_column": "file"}, **batch), ScriptedLLM())
    run(job(tmp_path, input={"path": paths}), ScriptedLLM())
    with pytest.raises(OutputConflict, match=r"output\.file_column: was null, is \"file\""):
        run(job(tmp_path, input={"path": paths}, output={"file_column": "file"}), ScriptedLLM())
    shutil.rmtree(tmp_path / "out")
    output = {"file_column": "file", "format": "parquet"}
    run(job(tmp_path, input={"path": paths, "where": "false"}, output=output), ScriptedLLM())
    assert "file" in pq.read_schema(next((tmp_path / "out" / "parts").iterdir())).names
