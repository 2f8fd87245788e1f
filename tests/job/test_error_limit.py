"""A job whose rows all failed does not end well, unless `errors.max` says so."""

from __future__ import annotations

import json

import pytest

from batchinfer.cli.main import main
from batchinfer.errors import EngineFailure, InvalidInput, TooManyRowErrors
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from batchinfer.log import log
from tests.job.doubles import ScriptedLLM, job, run, write_parquet


@pytest.fixture(autouse=True)
def log_as_before():
    """Restore what the command line's flags set."""
    yield
    log.configure("info")


def failing(*good):
    """Every row fails but those at `good`, for now."""
    return ScriptedLLM(lambda prompt: None if prompt.index in good else EngineFailure(f"no {prompt.index}"))


def report(tmp_path, name="report.json"):
    return json.loads((tmp_path / "out" / name).read_bytes())


def test_a_job_whose_rows_all_failed_is_refused_with_its_first_error(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    with pytest.raises(TooManyRowErrors) as caught:
        run(job(tmp_path), failing())
    message = str(caught.value)
    assert message.startswith("all 10 rows failed (engine: 10), errors.max is not set; the output is complete: ")
    assert "errors.max: 100%" in message and message.endswith("; row 0: no 0")
    ended = report(tmp_path)
    assert (ended["outcome"], ended["exit_code"], ended["complete"]) == ("too_many_errors", 10, True)
    assert ended["message"] == message and (tmp_path / "out/_SUCCESS").exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_finished_output_is_judged_again_and_its_first_error_named(tmp_path, form):
    write_parquet(tmp_path / "in.parquet", 10)
    spec = job(tmp_path, output={"format": form, "prefix": "m_"})
    for _ in range(3):
        with pytest.raises(TooManyRowErrors, match=r"all 10 rows failed .*row 0.*no 0$"):
            run(spec, failing())
    assert report(tmp_path)["exit_code"] == 10


def test_one_answer_is_enough(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    run(job(tmp_path), failing(7))
    run(job(tmp_path), failing())
    assert report(tmp_path)["outcome"] == "done"


@pytest.mark.parametrize("most", [1.0, "100%", 10])
def test_what_errors_max_allows(tmp_path, most):
    write_parquet(tmp_path / "in.parquet", 10)
    for _ in range(2):
        run(job(tmp_path, errors={"max": most}), failing())
    assert report(tmp_path)["outcome"] == "done"


def test_a_single_row_that_failed_is_called_the_only_row(tmp_path):
    write_parquet(tmp_path / "in.parquet", 1)
    with pytest.raises(TooManyRowErrors, match=r"^the only row failed \(engine: 1\)"):
        run(job(tmp_path), failing())


def test_nothing_selected_is_no_failure(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    run(job(tmp_path, input={"where": "id > 99"}), failing())


def test_rows_that_are_left_out_do_not_count(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    with pytest.raises(TooManyRowErrors, match="all 2 rows failed"):
        run(job(tmp_path, input={"where": "id > 7"}), failing())


def test_a_retry_that_answers_a_row_ends_well(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    spec = job(tmp_path)
    with pytest.raises(TooManyRowErrors):
        run(spec, failing())
    with pytest.raises(TooManyRowErrors, match="all 10 rows failed"):
        run(spec, failing(), job=retry_job)
    run(spec, failing(3), job=retry_job)
    assert report(tmp_path)["outcome"] == "done"
    run(spec, failing(), job=retry_job)


def test_a_retry_of_nothing_is_judged(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    never = ScriptedLLM(lambda prompt: InvalidInput("never"))
    for work in ({}, {"job": retry_job}):
        with pytest.raises(TooManyRowErrors, match=r"row 0.*never$"):
            run(job(tmp_path), never, **work)


def test_shards_are_judged_by_what_all_have_written(tmp_path):
    write_parquet(tmp_path / "in.parquet", 12)  # chunks of four rows
    spec = job(tmp_path)
    with pytest.raises(TooManyRowErrors, match=r"all 4 rows failed .*other workers are not done.*row 0: no 0"):
        run(spec, failing(), shard=Shard(0, 3, "test"))
    assert report(tmp_path, "report-0-of-3.json")["exit_code"] == 10
    with pytest.raises(TooManyRowErrors, match="all 4 rows failed"):
        run(spec, failing(), shard=Shard(0, 3, "test"))  # nothing is left to do
    run(spec, failing(5), shard=Shard(1, 3, "test"))
    run(spec, failing(), shard=Shard(2, 3, "test"))
    run(spec, failing(), shard=Shard(0, 3, "test"))


def test_a_salvaged_row_counts(tmp_path):
    write_parquet(tmp_path / "in.parquet", 8)

    def stop(done):
        if done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(job(tmp_path), ScriptedLLM(lambda prompt: EngineFailure("no"), after=stop))
    with pytest.raises(TooManyRowErrors, match="all 8 rows failed"):
        run(job(tmp_path), failing())


def test_rehearsal_and_printed_commands(tmp_path, capsys):
    write_parquet(tmp_path / "in.parquet", 5)
    path, out = tmp_path / "job.yaml", tmp_path / "it's out; $HOME"
    path.write_text(
        f"model: fake\ninput: {{path: {tmp_path}/in.parquet}}\noutput:\n  path: {out}\nprompt:\n  user: {{0}}"
    )
    path.write_text(path.read_text().replace("{0}", '"{{ text.no.such }}"'))
    assert main(["--no-log-json", "run", str(path), "--rehearse"]) == 10
    captured = capsys.readouterr()
    quoted = str(out).replace("'", "'\"'\"'")
    assert f"batchinfer show '{quoted}-rehearsal' --errors" in captured.err
    good = ["run", str(path), "--set", "prompt.user={{ text }}", "--set", f"output.path={out}2"]
    assert main(["--no-log-json", *good]) == 0
    assert f"  batchinfer verify '{quoted}2'" in capsys.readouterr().out
    assert main(["show", f"{out}2", "--errors"]) == 0
    assert "no row that is committed is an error" in capsys.readouterr().out
