"""Retry passes: which rows run again, what readers see at every moment, and crashes in between."""

import contextlib
import hashlib
import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import EngineFailure, InvalidInput, OutputConflict, StorageError, UsageError
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from tests.job.doubles import MemoryStore, ScriptedLLM, job, rows_of_output, run, write_parquet


def flaky(prompt):
    """Rows 3, 6, 9 … fail for now, row 2 for good."""
    if prompt.index == 2:
        return InvalidInput("never")
    return EngineFailure("out of memory") if prompt.index and prompt.index % 3 == 0 else None


def well(prompt):
    return InvalidInput("never") if prompt.index == 2 else None


def test_retry_replaces_only_what_can_be_retried(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    spec = job(tmp_path)
    run(spec, ScriptedLLM(flaky))
    again = ScriptedLLM(well)
    report = run(spec, again, job=retry_job)
    assert sorted(prompt.index for prompt in again.seen) == [3, 6, 9]
    rows = rows_of_output(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(10))
    assert [row["status"] for row in rows] == ["ok", "ok", "error", *["ok"] * 7]
    assert rows[3]["response"] == "row 3!" and rows[2]["error"] == "never"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["pass"] == 1 and manifest["errors"] == {"invalid_input": 1} and report.pass_number == 1
    assert len(list((tmp_path / "out/parts").iterdir())) == 3
    success = (tmp_path / "out/_SUCCESS").read_text().strip()
    assert success == hashlib.sha256((tmp_path / "out/manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "sections",
    [
        {"output": {"format": "jsonl", "compression": "none"}},
        {"output": {"samples": "rows", "token_ids": True}, "sampling": {"n": 2, "logprobs": 1}},
        {"output": {"token_ids": True, "prefix": "m_"}, "sampling": {"n": 3}},
    ],
)
def test_a_part_with_kept_rows_is_what_one_run_would_have_written(tmp_path, sections):
    write_parquet(tmp_path / "in.parquet", 10)
    spec = job(tmp_path, **sections)
    run(spec, ScriptedLLM(flaky))
    run(spec, ScriptedLLM(well), job=retry_job)
    whole = job(tmp_path, **{**sections, "output": {**sections["output"], "path": str(tmp_path / "whole")}})
    run(whole, ScriptedLLM(well))
    parts = [sorted(p.name for p in (tmp_path / name / "parts").iterdir()) for name in ("out", "whole")]
    assert parts[0] == parts[1]


def test_openai_batch_lines_are_retried(tmp_path):
    lines = [
        {"custom_id": f"c{n}", "method": "POST", "url": url, "body": body}
        for n in range(6)
        for url, body in [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"q{n}"}], "n": 2})
            if n % 2
            else ("/v1/completions", {"prompt": f"q{n}"})
        ]
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    batch = {"input": {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}, "prompt": None}
    spec = job(tmp_path, **batch)
    run(spec, ScriptedLLM(flaky))
    first = rows_of_output(tmp_path / "out")
    assert first[3]["response"]["status_code"] == 500 and first[3]["error"]["code"] == "engine"
    run(spec, ScriptedLLM(well), job=retry_job)
    whole = job(tmp_path, **batch, output={"path": str(tmp_path / "whole")})
    run(whole, ScriptedLLM(well))
    rows = rows_of_output(tmp_path / "out")
    assert rows == rows_of_output(tmp_path / "whole")
    assert [row["custom_id"] for row in rows] == [f"c{n}" for n in range(6)]
    assert [len(row["response"]["body"]["choices"]) for row in rows if row["error"] is None] == [1, 2, 2, 1, 2]


def test_nothing_to_retry_and_not_finished(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    with pytest.raises(UsageError, match="not finished"):
        run(job(tmp_path), job=retry_job)
    run(job(tmp_path), ScriptedLLM(well))
    before = (tmp_path / "out/manifest.json").read_bytes()
    report = run(job(tmp_path), job=retry_job)
    assert (tmp_path / "out/manifest.json").read_bytes() == before and report.complete


def test_an_altered_part_is_not_built_upon(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    run(job(tmp_path), ScriptedLLM(flaky))
    part = min((tmp_path / "out/parts").iterdir())
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(OutputConflict, match="altered since"):
        run(job(tmp_path), ScriptedLLM(well), job=retry_job)


def test_a_second_pass_and_a_run_after_it(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    store = MemoryStore()
    run(job(tmp_path), ScriptedLLM(flaky), store)
    run(job(tmp_path), ScriptedLLM(lambda prompt: EngineFailure("x") if prompt.index == 3 else None), store, retry_job)
    run(job(tmp_path), ScriptedLLM(), store, retry_job)
    before = dict(store.objects)
    assert json.loads(before["manifest.json"])["pass"] == 2
    run(job(tmp_path), None, store)
    changed = {name for name in store.objects if before.get(name) != store.objects[name]}
    assert changed <= {"report.json"}


def see(objects):
    """Return what a reader of commit records sees: chunk → part, of the highest pass."""
    seen = {}
    for name, data in sorted(objects.items()):
        if name.startswith("commits/"):
            record = json.loads(data)
            if record["pass"] >= seen.get(record["chunk"], {"pass": -1})["pass"]:
                seen[record["chunk"]] = record
    return seen


@pytest.fixture(scope="module")
def retried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retry")
    write_parquet(folder / "in.parquet", 18)
    spec = job(folder, output={"chunk_rows": 5})
    first = MemoryStore()
    run(spec, ScriptedLLM(flaky), first)
    start = dict(first.objects)
    run(spec, ScriptedLLM(well), first, retry_job)
    parts = {chunk: record["part"] for chunk, record in see(first.objects).items()}
    return lambda: (spec, dict(start), parts)  # hypothesis shows arguments, and these are long


@settings(max_examples=50, deadline=None)
@given(crashes=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_crashes_in_a_retry_pass(retried, crashes):
    spec, objects, parts = retried()
    for crash_at, after, sharded in crashes:
        shard = Shard(0, 2, "t") if sharded else Shard()
        with contextlib.suppress(StorageError):
            run(spec, ScriptedLLM(well), MemoryStore(objects, crash_at, after), retry_job, shard=shard)
        records = see(objects)
        assert len(records) == 4 and all(record["part"] in objects for record in records.values())
        manifest = json.loads(objects["manifest.json"])
        assert all(part["part"] in objects for part in manifest["parts"])
    run(spec, ScriptedLLM(well), MemoryStore(objects), retry_job)
    assert {chunk: record["part"] for chunk, record in see(objects).items()} == parts
    assert {name for name in objects if name.startswith("parts/")} == set(parts.values())
