"""The whole job over the fake model, on local disk and on a store in memory."""

import contextlib
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import (
    EngineFailure,
    InputError,
    InputMissing,
    InvalidInput,
    OutputConflict,
    StorageError,
    TooManyRowErrors,
)
from batchinfer.job.ledger import open_output
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from batchinfer.spec import StorageSpec
from tests.job.doubles import MemoryStore, ScriptedLLM, job, rows_of_output, run, snapshot, write_parquet


def test_every_row_has_one_result_and_the_input_columns(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    report = run(job(tmp_path), ScriptedLLM(order=random.Random(1)))
    rows = rows_of_output(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(10)) == [row["row"] for row in rows]
    assert [row["response"] for row in rows] == [f"row {n}!" for n in range(10)]
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[0] | {"id": 0} == {
        "id": 0,
        "text": "row 0",
        "row": 0,
        "response": "row 0!",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "status": "ok",
        "error_type": None,
        "error": None,
    }
    assert report.outcome == "done" and report.complete and report.totals["rows"] == 10
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (saved["outcome"], saved["rows"]["run"]) == ("done", 10)


def test_the_real_engine_with_the_fake_runner(tmp_path):
    write_parquet(tmp_path / "in.parquet", 30)
    run(job(tmp_path))
    rows = rows_of_output(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(30))
    assert all(row["completion_tokens"] == 3 and row["response"] for row in rows)


def test_running_again_changes_nothing_and_loads_no_model(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    run(job(tmp_path), ScriptedLLM())
    before = snapshot(tmp_path / "out")
    report = run(job(tmp_path), store=None, llm=None)
    assert snapshot(tmp_path / "out") == before
    assert report.complete and report.rows["run"] == 0 and report.rows["committed_before"] == 10


def test_order_of_completions_does_not_change_a_byte(tmp_path):
    write_parquet(tmp_path / "in.parquet", 23)
    outputs = []
    for seed in range(3):
        spec = job(tmp_path, output={"path": str(tmp_path / f"out{seed}")})
        run(spec, ScriptedLLM(order=random.Random(seed)))
        outputs.append(snapshot(tmp_path / f"out{seed}"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_shards_share_the_chunks_and_the_last_one_finishes(tmp_path):
    write_parquet(tmp_path / "in.parquet", 23)
    run(job(tmp_path, output={"path": str(tmp_path / "whole")}), ScriptedLLM())
    for index in (2, 0, 1):
        report = run(job(tmp_path), ScriptedLLM(), shard=Shard(index, 3, "test"))
        assert report.complete == (index == 1)
        assert (tmp_path / "out" / "_SUCCESS").exists() == (index == 1)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "report-2-of-3.json").read_text())["shard"] == "2-of-3"


def test_another_fingerprint_is_refused_and_named(tmp_path):
    write_parquet(tmp_path / "in.parquet", 5)
    run(job(tmp_path), ScriptedLLM())
    before = snapshot(tmp_path / "out")
    with pytest.raises(OutputConflict, match=r"sampling\.temperature: was not set, is 0\.5"):
        run(job(tmp_path, sampling={"temperature": 0.5}), ScriptedLLM())
    with pytest.raises(OutputConflict, match=r'prompt\.template: was "\{\{ text \}\}", is "\{\{ id \}\}"'):
        run(job(tmp_path, prompt={"template": "{{ id }}"}), ScriptedLLM())
    write_parquet(tmp_path / "in.parquet", 6)
    with pytest.raises(OutputConflict, match=r"in\.parquet changed since the output was begun"):
        run(job(tmp_path), ScriptedLLM())
    assert snapshot(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["outcome"] == "done"


def test_settings_of_speed_and_place_are_no_conflict(tmp_path):
    write_parquet(tmp_path / "in.parquet", 5)
    run(job(tmp_path), ScriptedLLM())

    def kept():
        return (tmp_path / "out/job.json").read_bytes(), json.loads((tmp_path / "out/report.json").read_bytes())

    first, report = kept()
    assert report["ran_with"]["engine"]["max_num_seqs"] == 4 and report["ran_with"]["errors"] == {"max": None}
    run(job(tmp_path, engine={"max_num_seqs": 9}, errors={"max": 1}, fake={"step_s": 0.1}), ScriptedLLM())
    again, report = kept()
    assert report["ran_with"]["engine"]["max_num_seqs"] == 9 and report["ran_with"]["errors"] == {"max": 1}
    assert {"batchinfer", "python"} <= report["ran_with"]["versions"].keys()
    # job.json says of both what is true of both
    assert first == again and not {"max_num_seqs", "errors", "step_s"} & set(re.findall(r"\w+", again.decode()))
    assert json.loads(again)["engine"].keys() == {"dtype", "kv_cache_dtype", "max_model_len", "quantization"}
    assert open_output(str(tmp_path / "out"), StorageSpec()).spec.fake.answer_tokens == 3


def test_where_limit_and_columns(tmp_path):
    write_parquet(tmp_path / "in.parquet", 40, odd=pa.array([n % 2 == 1 for n in range(40)]))
    spec = job(tmp_path, input={"where": "odd", "limit": 7, "columns": ["id"]})
    report = run(spec, ScriptedLLM())
    rows = rows_of_output(tmp_path / "out")
    assert [row["id"] for row in rows] == [1, 3, 5, 7, 9, 11, 13] == [row["row"] for row in rows]
    assert "text" not in rows[0] and "odd" not in rows[0]
    assert report.rows["covered"] == 14 and report.rows["left_out"] == 7


def test_chunks_in_which_nothing_is_selected(tmp_path):
    write_parquet(tmp_path / "in.parquet", 20)
    run(job(tmp_path, input={"where": "id == 19"}), ScriptedLLM())
    assert [row["id"] for row in rows_of_output(tmp_path / "out")] == [19]
    first = json.loads((tmp_path / "out/commits/000000.json").read_text())
    assert first["part"] is None and first["rows"] == 0
    assert (tmp_path / "out/_SUCCESS").exists()


def test_a_bad_row_ends_alone(tmp_path):
    texts = ["a", None, "", "d", "  ", "f"]
    table = pa.table({"text": texts, "over": [None, None, None, '{"temperature": -1}', None, '{"n": 2}']})
    pq.write_table(table, tmp_path / "in.parquet")
    run(job(tmp_path, sampling={"column": "over"}), ScriptedLLM())
    rows = rows_of_output(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", *["error"] * 5]
    kinds = ["invalid_input", "invalid_input", "bad_parameters", "invalid_input", "bad_parameters"]
    assert [row["error_type"] for row in rows[1:]] == kinds
    assert "null" in rows[1]["error"] and "empty" in rows[2]["error"] and "temperature" in rows[3]["error"]
    assert rows[1]["response"] is None and rows[1]["finish_reason"] is None


def test_errors_max_stops_early_and_can_be_raised(tmp_path):
    write_parquet(tmp_path / "in.parquet", 40)
    failing = ScriptedLLM(lambda prompt: InvalidInput("no") if prompt.index % 2 else None)
    with pytest.raises(TooManyRowErrors, match=r"errors\.max is 3"):
        run(job(tmp_path, errors={"max": 3}), failing)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["outcome"] == "too_many_errors" and report["exit_code"] == 10
    assert report["errors"]["invalid_input"]["examples"][0] == {"row": 1, "error": "no"}
    assert not (tmp_path / "out/_SUCCESS").exists()
    again = ScriptedLLM(failing.answer)
    run(job(tmp_path, errors={"max": 20}), again)
    assert len(again.seen) < 40  # what was finished is not run again
    with pytest.raises(TooManyRowErrors, match=r"20 of 40 rows failed.*complete"):
        run(job(tmp_path, errors={"max": 19}), again)


def test_errors_max_as_a_share_is_judged_late(tmp_path):
    write_parquet(tmp_path / "in.parquet", 300)
    first_fail = ScriptedLLM(lambda prompt: InvalidInput("no") if prompt.index < 20 else None)
    run(job(tmp_path, errors={"max": "10%"}), first_fail)
    spec = job(tmp_path, errors={"max": "10%"}, output={"path": str(tmp_path / "other")})
    with pytest.raises(TooManyRowErrors):
        run(spec, ScriptedLLM(lambda prompt: InvalidInput("no") if prompt.index < 40 else None))


def test_salvaged_rows_are_not_run_again_and_the_bytes_are_the_same(tmp_path):
    write_parquet(tmp_path / "in.parquet", 40)
    run(job(tmp_path, output={"path": str(tmp_path / "whole")}), ScriptedLLM())

    def stop(done):
        if done == 18:
            raise EngineFailure("out of memory")

    with pytest.raises(EngineFailure):
        run(job(tmp_path), ScriptedLLM(after=stop, order=random.Random(3)))
    assert list((tmp_path / "out/salvage").iterdir())
    again = ScriptedLLM()
    report = run(job(tmp_path), again, shard=Shard(0, 1, "t"))
    assert len(again.seen) + 17 == 40
    assert report.rows["recovered"] + 4 * report.chunks["committed_before"] == 17
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not list((tmp_path / "out/salvage").iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"junk" + data, lambda data: b""])
def test_damaged_salvage_is_only_a_warning(tmp_path, damage, capsys):
    write_parquet(tmp_path / "in.parquet", 20)

    def stop(done):
        if done == 10:
            raise EngineFailure("x")

    with pytest.raises(EngineFailure):
        run(job(tmp_path), ScriptedLLM(after=stop))
    [journal] = (tmp_path / "out/salvage").iterdir()
    journal.write_bytes(damage(journal.read_bytes()))
    run(job(tmp_path), ScriptedLLM())
    assert "salvage ignored" in capsys.readouterr().err
    assert len(rows_of_output(tmp_path / "out")) == 20


def test_a_straggler_does_not_hold_memory(tmp_path):
    """Row 0 finishes last; the window bounds how far the others run ahead."""
    write_parquet(tmp_path / "in.parquet", 12000)
    spec = job(tmp_path, output={"chunk_rows": 100})
    opened = []

    class Straggler(ScriptedLLM):
        def run_prompts(self, prompts):
            first = None
            for prompt in prompts:
                opened.append(prompt.index)
                if prompt.index == 0:
                    first = self._complete(prompt)
                else:
                    yield self._complete(prompt)
            yield first

    run(spec, Straggler())
    assert len(rows_of_output(tmp_path / "out")) == 12000


def test_nothing_matches(tmp_path):
    with pytest.raises(InputMissing):
        run(job(tmp_path, input={"path": str(tmp_path / "no*.parquet")}))
    assert not (tmp_path / "out").exists()


def test_a_store_that_replaces_objects_is_warned_of(tmp_path, capsys):
    write_parquet(tmp_path / "in.parquet", 5)

    class Careless(MemoryStore):
        def _create(self, name, data):
            self.put(name, data)
            return True

    store = Careless()
    run(job(tmp_path), ScriptedLLM(), store)
    assert "does not refuse to replace" in capsys.readouterr().err
    assert "_SUCCESS" in store.objects


FINAL = ("parts/", "commits/", "plan.json", "manifest.json", "_SUCCESS")


def final(store):
    return {name: data for name, data in store.objects.items() if name.startswith(FINAL)}


@pytest.fixture(scope="module")
def crash_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    write_parquet(folder / "in.parquet", 18)
    spec = job(folder, output={"chunk_rows": 5})
    whole = MemoryStore()
    run(spec, ScriptedLLM(), whole)
    return lambda: (spec, final(whole))  # hypothesis shows arguments, and these are long


@settings(max_examples=60, deadline=None)
@given(crashes=st.lists(st.tuples(st.integers(1, 45), st.booleans(), st.integers(0, 9)), max_size=5))
def test_after_crashes_at_any_operation_the_output_is_the_same(crash_job, crashes):
    spec, whole = crash_job()
    objects = {}
    for crash_at, after, seed in crashes:
        store = MemoryStore(objects, crash_at, after)
        try:
            run(spec, ScriptedLLM(order=random.Random(seed)), store)
        except StorageError:
            # whoever trusts commit records sees whole parts, at every moment
            for name, data in objects.items():
                if name.startswith("commits/"):
                    assert json.loads(data)["part"] in objects
    last = MemoryStore(objects)
    run(spec, ScriptedLLM(), last)
    assert final(last) == whole


@settings(max_examples=40, deadline=None)
@given(crash_at=st.integers(1, 60), shards=st.integers(2, 3), data=st.data())
def test_crashes_of_one_of_several_workers(crash_job, crash_at, shards, data):
    spec, whole = crash_job()
    objects = {}
    order = data.draw(st.permutations(range(shards)))
    for index in order:
        store = MemoryStore(objects, crash_at if index == 0 else None, data.draw(st.booleans()))
        with contextlib.suppress(StorageError):
            run(spec, ScriptedLLM(), store, shard=Shard(index, shards, "test"))
    last = MemoryStore(objects)
    run(spec, ScriptedLLM(), last)
    assert final(last) == whole


def test_two_workers_with_the_same_shard(tmp_path):
    """Their answers differ; what was committed first holds, and every part that nobody names is swept."""
    write_parquet(tmp_path / "in.parquet", 20)
    store = MemoryStore()

    class Slow(ScriptedLLM):
        def run_prompts(self, prompts):
            for completion in super().run_prompts(prompts):
                if completion.index == 7:
                    run(job(tmp_path), ScriptedLLM(lambda prompt: "fast"), store)
                yield completion

    run(job(tmp_path), Slow(lambda prompt: "slow"), store)
    manifest = json.loads(store.objects["manifest.json"])
    assert {part["part"] for part in manifest["parts"]} == {name for name in store.objects if name.startswith("parts/")}
    assert manifest["rows"] == 20


def test_sampling_column_and_per_row_errors_of_type(tmp_path):
    table = pa.table(
        {"text": ["a", "b"], "over": [{"temperature": 0.5, "top_k": None}, {"temperature": 2.0, "top_k": 3}]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    llm = ScriptedLLM()
    run(job(tmp_path, sampling={"column": "over"}), llm)
    assert [(p.params.temperature, p.params.top_k, p.params.max_tokens) for p in llm.seen] == [(0.5, 0, 8), (2.0, 3, 8)]


@pytest.mark.timeout(60)
def test_a_failed_commit_ends_a_job_whose_window_is_full(tmp_path):
    """Nothing leaves the window any more: waiting for it would be for ever."""
    write_parquet(tmp_path / "in.parquet", 12000)

    class Dying(MemoryStore):
        def put_file(self, name, local):
            raise StorageError("gone")

    for llm in (ScriptedLLM(), None):
        with pytest.raises(StorageError, match="gone"):
            run(job(tmp_path, output={"chunk_rows": 100}), llm, Dying())


def test_a_run_over_an_output_whose_retry_broke_off_at_its_end(tmp_path):
    """Manifest of pass 1 written, _SUCCESS not: the run finishes that pass, it does not go back to pass 0."""
    write_parquet(tmp_path / "in.parquet", 10)
    store = MemoryStore()
    run(job(tmp_path), ScriptedLLM(lambda prompt: EngineFailure("x") if prompt.index == 3 else None), store)
    run(job(tmp_path), ScriptedLLM(), store, retry_job)
    done = dict(store.objects)
    store.objects["_SUCCESS"] = b"0" * 64
    run(job(tmp_path), None, store)
    assert {**store.objects, "report.json": b""} == {**done, "report.json": b""}


def test_a_file_that_changes_while_it_is_read(tmp_path):
    write_parquet(tmp_path / "in.parquet", 12000)

    class Meddling(ScriptedLLM):
        def run_prompts(self, prompts):
            for completion in super().run_prompts(prompts):
                if completion.index == 5:
                    write_parquet(tmp_path / "in.parquet", 12001)
                yield completion

    with pytest.raises(InputError, match=r"in\.parquet: changed while it was read"):
        run(job(tmp_path, output={"chunk_rows": 500}), Meddling())
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["outcome"], report["exit_code"]) == ("failed", 65)
