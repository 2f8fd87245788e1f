"""Plans: chunks cover every row once, plan.json is small, exact and tamper-evident, and differences are named."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputMissing, OutputConflict, SpecError
from batchinfer.io.rows import InputFile, Inputs, scan_inputs
from batchinfer.job.ledger import CommitRecord, Ledger, open_output, save_spec
from batchinfer.job.plan import CHUNK_BYTES, JobPlan, load_plan, make_plan, save_plan
from batchinfer.job.prepare import draft_plan
from batchinfer.ops import choose, devices
from batchinfer.spec import StorageSpec
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run, write_parquet
from tests.ops import toy

SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])


def inputs_of(counts, size=1000):
    files = tuple(InputFile(f"f{n}.parquet", "parquet", size, f"e{n}", rows) for n, rows in enumerate(counts))
    return Inputs(files, SCHEMA)


@settings(max_examples=200, deadline=None)
@given(files=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=5))
def test_chunks_cover_every_row_once_and_never_cross_files(files):
    counts = tuple(rows for rows, _ in files)
    plan = JobPlan(inputs_of(counts), tuple(step for _, step in files), counts, {"format": "1"})
    covered = []
    for chunk, (span, base) in enumerate(zip(plan.chunks, plan.bases, strict=True)):
        assert 0 < span.count <= plan.chunk_rows[span.file] or not any(counts)
        for offset in range(span.count):
            covered.append((span.file, span.start + offset))
            assert plan.chunk_of(base + offset) == chunk
            assert base + offset == len(covered) - 1
    assert covered == [(file, row) for file, rows in enumerate(counts) for row in range(rows)]
    assert plan.chunks
    assert JobPlan.from_bytes(plan.to_bytes()) == plan


def test_a_plan_of_two_million_rows_is_small():
    plan = JobPlan(inputs_of((2_000_000,)), (1000,), (2_000_000,), {"format": "1"})
    assert len(plan.chunks) == 2000 and len(plan.to_bytes()) < 2000


def test_huge_rows_make_smaller_chunks(tmp_path):
    write_parquet(tmp_path / "in.parquet", 5)
    draft = draft_plan(job(tmp_path, output={"chunk_rows": 1000}))
    huge = inputs_of((100_000,), size=100_000 << 20)
    plan = make_plan(draft.spec, huge, draft.layout, {}, (100_000,))
    assert plan.chunk_rows == (CHUNK_BYTES // (4 << 20),)
    limited = draft.spec.model_copy(update={"input": draft.spec.input.model_copy(update={"limit": 3})})
    assert make_plan(limited, huge, draft.layout, {}, (3,)).chunk_rows == (1000,)


@pytest.mark.parametrize(
    "alter",
    [
        lambda values: values["fingerprint"].update(seed="7"),
        lambda values: values.update(rows=99),
        lambda values: values["files"][0].update(taken=3),
        lambda values: values.pop("files"),
        lambda values: values.update(arrow_schema="nonsense"),
        lambda values: values.update(format="0"),
    ],
)
def test_an_altered_plan_is_refused(alter):
    plan = JobPlan(inputs_of((10,)), (4,), (10,), {"format": "1", "seed": "0"})
    values = json.loads(plan.to_bytes())
    alter(values)
    with pytest.raises(OutputConflict):
        JobPlan.from_bytes(json.dumps(values).encode())
    with pytest.raises(OutputConflict):
        JobPlan.from_bytes(b"junk")


def test_differences_are_named_with_both_values():
    store = MemoryStore()
    first = JobPlan(inputs_of((10,)), (4,), (10,), {"seed": "0", "input.files": "a", "prompt.user": '"x"'})
    save_plan(first, store)
    save_plan(first, store)
    other = replace(first, fingerprint={"seed": "1", "input.files": "a", "output.prefix": '"p"'})
    with pytest.raises(OutputConflict) as caught:
        save_plan(other, store)
    message = str(caught.value)
    for part in ("seed: was 0, is 1", 'prompt.user: was "x", is not set', 'output.prefix: was not set, is "p"'):
        assert part in message
    assert "input.files" not in message
    changed = replace(first, inputs=inputs_of((10,), size=7), fingerprint={**first.fingerprint, "input.files": "b"})
    with pytest.raises(OutputConflict, match=r"f0\.parquet changed .*1000 bytes then, 7 now"):
        save_plan(changed, store)


def test_a_rounded_cache_decides_the_answers_and_its_size_does_not(tmp_path):
    write_parquet(tmp_path / "in.parquet", 4)
    run(job(tmp_path, engine={"kv_cache_dtype": "bfloat16"}), ScriptedLLM())
    run(job(tmp_path, engine={"kv_cache_dtype": "bfloat16", "kv_cache_tokens": 999}), ScriptedLLM())
    with pytest.raises(OutputConflict, match=r'engine\.kv_cache_dtype: was "bfloat16", is not set'):
        run(job(tmp_path, engine={"kv_cache_tokens": 999}), ScriptedLLM())


def test_a_device_with_formats_of_its_own_decides_the_answers(tmp_path, monkeypatch):
    table = {"toy": ("tests.ops.toy",), **devices.BACKENDS}
    monkeypatch.setattr(devices, "BACKENDS", table)
    monkeypatch.setattr(choose, "BACKENDS", table)
    write_parquet(tmp_path / "in.parquet", 4)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    spec = job(tmp_path, model=str(tmp_path / "model"))
    monkeypatch.setattr(toy, "PROBLEM", ["no toy is plugged in"])
    assert "engine.device" not in draft_plan(spec).plan.fingerprint
    run(spec, ScriptedLLM())
    monkeypatch.setattr(toy, "PROBLEM", [])
    with pytest.raises(OutputConflict, match=r"engine\.device: was not set, is toy"):
        run(spec, ScriptedLLM())
    host = job(tmp_path, model=str(tmp_path / "model"), engine={"device": list(table)[-1]})
    run(host, ScriptedLLM())


def test_limit_with_where_covers_up_to_the_row_that_fills_it(tmp_path):
    for name, rows in (("a", 1500), ("b", 1500), ("c", 10)):
        pq.write_table(pa.table({"text": ["x"] * rows, "k": range(rows)}), tmp_path / f"{name}.parquet")
    section = {"path": str(tmp_path / "*.parquet"), "where": "k % 100 == 0", "limit": 17}
    plan = draft_plan(job(tmp_path, input=section)).plan
    assert plan.taken == (1500, 101, 0)
    assert draft_plan(job(tmp_path, input={**section, "limit": 1000})).plan.taken == (1500, 1500, 10)


def test_where_nothing_is_written_there_is_nothing_to_open(tmp_path):
    with pytest.raises(InputMissing, match=r"no plan\.json"):
        load_plan(MemoryStore())
    write_parquet(tmp_path / "in.parquet", 5)
    run(job(tmp_path), ScriptedLLM())
    output = open_output(str(tmp_path / "out"), StorageSpec())
    assert output.plan.rows == 5 and output.spec.output.chunk_rows == 4
    assert [key.chunk for key in output.ledger.listing().in_effect().values()] == [0, 1]


def test_secrets_stay_out_of_the_saved_job(tmp_path):
    store = MemoryStore()
    options = {"key": "AKIA", "secret": "s3cr3t", "session_token": "t0k3n", "use_ssl": False}
    save_spec(job(tmp_path, storage={"options": options}), store)
    assert json.loads(store.objects["job.json"])["storage"]["options"] == {"use_ssl": False}


def test_records_of_other_jobs_and_damaged_ones_are_refused():
    plan = JobPlan(inputs_of((10,)), (4,), (10,), {"format": "1"})
    store = MemoryStore()
    ledger = Ledger(store, plan)
    record = CommitRecord(1, 0, plan.digest, "parts/x", 3, "ab", 4, 4, 4, {}, 9, 9, 0)
    assert ledger.commit(record) == record == ledger.commit(record)
    assert ledger.commit(replace(record, sha256="other")) == record
    retried = ledger.commit(replace(record, pass_number=12))
    assert ledger.listing().in_effect() == {1: retried.key} and retried.key.name == "commits/000001.r12.json"
    for name, data in (
        ("commits/000000.json", record.to_bytes()),
        ("commits/000000.json", b"{"),
        ("commits/000001.json", replace(record, fingerprint="x").to_bytes()),
        ("commits/000001.json", record.to_bytes().replace(b'"rows": 4', b'"rows": "4"')),
    ):
        store.objects[name] = data
        with pytest.raises(OutputConflict):
            listing = ledger.listing()
            list(listing.read(key for key in listing.records if not key.pass_number))


def test_the_prompt_of_a_job_without_columns(tmp_path):
    write_parquet(tmp_path / "in.parquet", 3)
    llm = ScriptedLLM()
    run(job(tmp_path, prompt={"template": "Say hi."}, input={"columns": ["id"]}), llm)
    assert [prompt.contents[0] for prompt in llm.seen] == ["Say hi."] * 3
    with pytest.raises(SpecError):
        draft_plan(job(tmp_path, prompt={"template": "{{ nope }}"}))


def test_rows_are_counted_once_and_again_where_files_changed(tmp_path, monkeypatch):
    lines = [b'{"text": "a", "k": %d}' % n for n in range(20)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    scans = []

    def counting(*arguments):
        scans.append(arguments)
        return scan_inputs(*arguments)

    monkeypatch.setattr("batchinfer.job.prepare.scan_inputs", counting)
    for number, section in enumerate([{}, {"limit": 5}, {"where": "k > 3", "limit": 30}]):
        spec = job(
            tmp_path, input={"path": str(tmp_path / "*.jsonl"), **section}, output={"path": f"{tmp_path}/{number}"}
        )
        first = run(spec, ScriptedLLM())
        assert len(scans) == number + 1
        assert run(spec, ScriptedLLM()).totals == first.totals
        assert len(scans) == number + 1
    (tmp_path / "c.jsonl").write_bytes(lines[0])
    spec = job(tmp_path, input={"path": str(tmp_path / "*.jsonl")}, output={"path": f"{tmp_path}/0"})
    with pytest.raises(OutputConflict, match=r"c\.jsonl is new"):
        run(spec, ScriptedLLM())
    assert len(scans) == 4
