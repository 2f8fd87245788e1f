"""Jobs that read prompts: scores, choices and vectors through plan, spool, commit, resume, retry and verify."""

from __future__ import annotations

import math

import pyarrow.parquet as pq
import pytest

from batchinfer import LLM
from batchinfer.cli.progress import summary
from batchinfer.errors import Drained, EngineFailure, InputError, OutputConflict, SpecError, StorageError
from batchinfer.job.drain import Drain
from batchinfer.job.inspect.preview import preview
from batchinfer.job.inspect.status import describe_status, read_status
from batchinfer.job.inspect.verify import audit
from batchinfer.job.inspect.verify_report import Audit
from batchinfer.job.ledger import JobOutput, Ledger
from batchinfer.job.plan import load_plan
from batchinfer.job.retry import retry_job
from batchinfer.spec import StorageSpec, parse_spec
from tests.job.doubles import MemoryStore, job, rows_of_output, run, snapshot, write_parquet

CHOICES = [["yes", "no"], ["a", "b", "a long choice"], None, ["yes", ""], ["x"]] * 2


def task_job(tmp_path, task, **sections):
    return job(tmp_path, task=task, sampling=None, **sections)


@pytest.fixture
def rows(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10, options=CHOICES, answer=[f" answer {n}" for n in range(9)] + [None])
    return tmp_path


def checked(tmp_path) -> Audit:
    found = audit(str(tmp_path / "out"), StorageSpec())
    assert found.differences == []
    return found


def test_score(rows):
    report = run(task_job(rows, "score", score={"continuation": "{{ answer }}"}))
    assert report.tokens["scored"] == 9 * 9 and report.tokens["completion"] == 0
    assert "81 scored" in summary(report)
    found = rows_of_output(rows / "out")
    expected = LLM("fake").score([(f"row {n}", f" answer {n}") for n in range(9)])
    for row, completion in zip(found, expected, strict=False):
        score = completion.scores[0]
        assert (row["logprob"], row["num_tokens"], row["is_greedy"]) == (score.logprob, 9, score.is_greedy)
        assert row["prompt_tokens"] == 5 and row["completion_tokens"] == 0 and row["status"] == "ok"
        assert "response" not in row
    assert found[9]["status"] == "error" and found[9]["logprob"] is None and "'answer'" in found[9]["error"]
    assert checked(rows).rows == 10


def test_score_of_whole_prompts_rolls(rows):
    run(task_job(rows, "score", engine={"max_model_len": 4, "kv_cache_tokens": 64}, output={"token_ids": True}))
    found = rows_of_output(rows / "out")
    assert [row["num_tokens"] for row in found] == [5] * 10
    assert bytes(found[3]["prompt_token_ids"]).decode() == "row 3"
    assert found[0]["logprob"] < 0 and checked(rows).rows == 10


def test_choose_by_a_column(rows):
    run(task_job(rows, "choose", score={"choices_column": "options", "measure": "characters"}))
    for row, choices in zip(rows_of_output(rows / "out"), CHOICES, strict=True):
        if choices is None or "" in choices:
            assert row["error_type"] == "invalid_input" and row["choice"] is None and row["scores"] is None
            continue
        assert len(row["scores"]) == len(choices) and row["choice"] == choices[row["choice_index"]]
        values = [score / len(choice) for score, choice in zip(row["scores"], choices, strict=True)]
        assert row["choice_index"] == values.index(max(values))
    assert checked(rows).rows == 10


def test_choose_by_templates_and_embed_as_lines(rows):
    lines = {"format": "jsonl"}
    run(task_job(rows, "choose", score={"choices": ["{{ id }} or", " none"]}, output=lines | {"prefix": "p_"}))
    found = rows_of_output(rows / "out")
    assert all(row["p_choice"] in (f"{row['id']} or", " none") and len(row["p_scores"]) == 2 for row in found)
    embedded = {"path": str(rows / "vectors")} | lines
    run(task_job(rows, "embed", output=embedded, embed={"pooling": "last"}))
    vectors = [row["embedding"] for row in rows_of_output(rows / "vectors")]
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-6) for vector in vectors)
    assert len({tuple(vector) for vector in vectors}) == 10
    assert checked(rows).rows == 10


def test_embedding_columns_are_float32(rows):
    run(task_job(rows, "embed", embed={"normalize": False}))
    part = next((rows / "out" / "parts").iterdir())
    assert str(pq.read_schema(part).field("embedding").type) in ("list<element: float>", "list<item: float>")


@pytest.mark.parametrize("task", ["score", "choose", "embed"])
def test_a_killed_job_continues(rows, task):
    """Whichever operation on the store fails: the same command again, and the output is the same."""
    section = {"choose": {"choices": ["a", "bc"]}}.get(task)
    spec = task_job(rows, task, **({"score": section} if section else {}))
    whole = MemoryStore()
    run(spec, store=whole)
    for crash_at in range(3, whole.operations, 3):
        store = MemoryStore(crash_at=crash_at)
        with pytest.raises(StorageError):
            run(spec, store=store)
        run(spec, store=(again := MemoryStore(store.objects)))
        parts = {name: data for name, data in whole.objects.items() if name.startswith(("parts/", "manifest"))}
        assert {name: again.objects[name] for name in parts} == parts


@pytest.mark.parametrize("section", [None, {"choices": ["a", "bc"]}])
def test_totals_count_what_a_stopped_run_scored(rows, section):
    """All rows but one are in the salvage when the second run begins."""
    spec = task_job(rows, "choose" if section else "score", **({"score": section} if section else {}))
    whole, stopped = MemoryStore(), MemoryStore()
    expected = run(spec, store=whole).totals
    right = LLM.from_spec(spec, None)

    class Stopping:
        model_facts = right.model_facts
        stats = right.stats

        def run_prompts(self, prompts):
            drain = self.drain
            held = sorted(right.run_prompts(prompts), key=lambda completion: completion.index)
            yield from (held[place] for place in (0, 1, 2, 4, 5, 6, 8))  # of three chunks, none is complete
            drain.request("test")
            yield held[9]

    llm = Stopping()
    llm.drain = Drain(leave=None)
    with pytest.raises(Drained):
        run(spec, llm, store=stopped, drain=llm.drain)
    assert any(name.startswith("salvage/") for name in stopped.objects)
    report = run(spec, store=stopped)
    assert report.rows["recovered"] >= 7 and report.totals == expected
    assert report.totals["scored_tokens"] == (10 * 3 if section else 10 * 5) > report.tokens["scored"] > 0
    output = JobOutput(stopped, load_plan(stopped), spec, Ledger(stopped, load_plan(stopped)))
    done = describe_status(read_status(output))
    assert f"{report.totals['scored_tokens']} scored" in done


def test_retry_keeps_what_was_read(rows):
    """The rows of a part that had no error come back from it unchanged."""
    spec = task_job(rows, "choose", score={"choices": ["a", "bc"]})
    right = LLM.from_spec(spec, None)

    class Flaky:
        model_facts = right.model_facts
        stats = right.stats

        def run_prompts(self, prompts):
            for completion in right.run_prompts(prompts):
                if completion.index % 4 == 1:
                    completion = type(completion)(completion.index, [], error=EngineFailure("once"))
                yield completion

    totals = run(spec, Flaky()).totals
    before = rows_of_output(rows / "out")
    assert sum(row["status"] == "error" for row in before) == 3
    assert totals["scored_tokens"] == 7 * 3
    assert run(spec, job=retry_job).totals["scored_tokens"] == 10 * 3  # of kept rows as well
    assert checked(rows).rows == 10
    run(
        spec_elsewhere := task_job(rows, "choose", score={"choices": ["a", "bc"]}, output={"path": str(rows / "other")})
    )
    assert spec_elsewhere.task == "choose"
    after = {row["row"]: row for row in rows_of_output(rows / "out") if row["status"] == "ok"}
    assert after == {row["row"]: row for row in rows_of_output(rows / "other")}


def test_another_task_is_another_job(rows):
    run(task_job(rows, "embed"))
    held = snapshot(rows / "out")
    with pytest.raises(OutputConflict, match="task: was embed, is score"):
        run(task_job(rows, "score"))
    with pytest.raises(OutputConflict, match=r"embed\.pooling"):
        run(task_job(rows, "embed", embed={"pooling": "cls"}))
    assert snapshot(rows / "out") == held


def test_preview_measures_what_is_read(rows):
    sample = preview(task_job(rows, "score", score={"continuation": "{{ answer }}"}), 10).sample
    assert len(sample.lengths) == 9 and sample.errors == {"invalid_input": 1}


def test_mistakes_are_found_before_anything_runs(rows):
    with pytest.raises(SpecError, match=r"choices_column.*'optoins'.*did you mean 'options'"):
        run(task_job(rows, "choose", score={"choices_column": "optoins"}))
    with pytest.raises(InputError, match=r"'id'.*must hold text or lists"):
        run(task_job(rows, "choose", score={"choices_column": "id"}))
    with pytest.raises(SpecError, match="answr"):
        run(task_job(rows, "score", score={"continuation": "{{ answr }}"}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"task": "rate"}, "task: must be one of generate, score, choose, embed, got 'rate'"),
        ({"task": "score", "sampling": {"temperature": 0}}, "sampling: does not go with task score"),
        ({"score": {"continuation": "x"}}, "score: does not go with task generate"),
        ({"task": "score", "embed": {"pooling": "cls"}}, "embed: does not go with task score"),
        ({"task": "choose"}, "score: task choose needs exactly one of choices, choices_column"),
        ({"task": "choose", "score": {"choices": ["a"], "choices_column": "b"}}, "exactly one of"),
        ({"task": "score", "score": {"choices": ["a"]}}, "score.choices: goes with task choose"),
        ({"task": "embed", "output": {"path": "o", "samples": "rows"}}, "output.samples: does not go with task embed"),
        (
            {"task": "embed", "prompt": None, "input": {"path": "i", "format": "openai-batch"}},
            "does not go with openai",
        ),
        ({"task": "embed", "embed": {"poolin": "cls"}}, "did you mean 'pooling'"),
    ],
)
def test_tasks_and_sections_go_together(values, problem):
    base = {"model": "fake", "input": {"path": "i"}, "prompt": {"template": "x"}, "output": {"path": "o"}}
    merged = {key: value for key, value in (base | values).items() if value is not None}
    with pytest.raises(SpecError) as caught:
        parse_spec(merged)
    assert problem in str(caught.value)
