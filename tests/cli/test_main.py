"""Tests of the command line: exit codes, messages and help pages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from batchinfer.cli.main import main
from batchinfer.cli.options import CACHE_VARIABLE, load_job
from batchinfer.job.drain import Drain
from batchinfer.job.shard import _PLATFORMS, OUR_COUNT, OUR_INDEX
from batchinfer.log import log
from tests import frozen
from tests.job.outputs import ROWS, write_input

CLI = [sys.executable, "-c", "from batchinfer.cli.main import process; process()"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Remove scheduler variables, disable signal handlers, and restore the log."""
    for names in _PLATFORMS.values():
        for name in filter(None, names):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(OUR_INDEX, raising=False)
    monkeypatch.delenv(OUR_COUNT, raising=False)
    monkeypatch.setattr(Drain, "install", lambda self: None)
    yield
    log.configure("info", None)


@pytest.fixture
def job(tmp_path) -> Path:
    write_input(tmp_path)
    values = {
        "model": "fake",
        "input": {"path": str(tmp_path / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "output": {"path": str(tmp_path / "out"), "chunk_rows": 10},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def output_rows(out: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in (out / "parts").iterdir())


def docs_page(name: str) -> str:
    return (frozen.ROOT / "docs" / name).read_text(encoding="utf-8")


# -- frozen pages --------------------------------------------------------------------------------------------------


def test_help_pages_equal_the_frozen_text():
    assert frozen.help_pages() == frozen.HELP.read_text(encoding="utf-8"), "meant? then: python -m tests.frozen"


def test_job_fields_equal_the_frozen_text():
    frozen_table = frozen.FIELDS.read_text(encoding="utf-8").strip()
    assert frozen.generated.job_table() == frozen_table, "meant? then: python -m tests.frozen"
    assert len(frozen.generated.job_fields()) <= 55


def test_every_exit_code_is_documented():
    page = docs_page("jobs/exit-codes.md")
    help_page = frozen.HELP.read_text(encoding="utf-8")
    for code in {0, *frozen.exit_codes()}:
        assert re.search(rf"^ +{code}  \S", help_page, re.MULTILINE), code
        assert re.search(rf"^\| {code} \| ", page, re.MULTILINE), code


def test_docs_list_the_shard_platforms():
    page = docs_page("jobs/shards.md")
    for name, variables in _PLATFORMS.items():
        assert all(f"`{variable}`" in page for variable in filter(None, variables)), name


@pytest.mark.parametrize("samples", ["list", "rows"])
def test_docs_list_the_output_columns(tmp_path, samples):
    from batchinfer.io.rows import scan_inputs
    from batchinfer.job.columns import output_layout
    from tests.job.outputs import make_spec

    write_input(tmp_path)
    spec = make_spec(tmp_path, output={"token_ids": True, "samples": samples}, sampling={"n": 2, "logprobs": 1})
    layout = output_layout(spec, scan_inputs(spec.input, spec.storage))
    page = docs_page("jobs/outputs.md")
    for name in set(layout.schema.names) - set(layout.carried):
        assert re.search(rf"^\| `{name}` \| ", page, re.MULTILINE), name


# -- a job from start to finish ------------------------------------------------------------------------------------


def test_job_runs_shows_and_verifies(job, tmp_path, capsys):
    assert run("plan", job) == 0
    assert "does not exist yet" in capsys.readouterr().out
    assert run("--no-log-json", "run", job) == 0
    out = capsys.readouterr().out
    assert f"{ROWS} rows in" in out and f"batchinfer verify {tmp_path / 'out'}" in out
    assert run("--no-log-json", "run", job) == 0
    assert f"already complete: {ROWS} rows" in capsys.readouterr().out
    nothing = ["--set", "input.where=row.text == ''", "--set", f"output.path={tmp_path}/nothing"]
    for said in ("0 rows in", "already complete: 0 rows"):
        assert run("--no-log-json", "run", job, *nothing) == 0
        assert said in capsys.readouterr().out
    assert run("plan", job) == 0
    assert "3 of 3 chunks committed" in capsys.readouterr().out
    for command in ("status", "verify", "show"):
        for place in (job, tmp_path / "out"):
            assert run(command, place) == 0, command
    out = capsys.readouterr().out
    assert "finished" in out and "no difference" in out and "question 0" in out
    assert run("retry", job) == 0


def test_run_logs_json_lines(job, tmp_path, capsys):
    assert run("--log-json", "run", job) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert captured.out == ""
    assert events[-1]["message"] == "done" and events[-1]["complete"] is True
    assert events[-1]["output"] == str(tmp_path / "out")


def test_set_and_limit_override_the_job_file(job, tmp_path):
    other = tmp_path / "other"
    assert run("run", job, "--set", f"output.path={other}", "--set", "output.format=jsonl", "--limit", 7) == 0
    rows = [json.loads(line) for part in (other / "parts").iterdir() for line in part.read_text().splitlines()]
    assert len(rows) == 7 and not (tmp_path / "out").exists()


def test_cache_directory_comes_from_the_environment(job, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, "/from/environment")
    assert load_job(job, []).storage.cache == "/from/environment"
    assert load_job(job, ["storage.cache=/from/job"]).storage.cache == "/from/job"


@pytest.mark.parametrize("model", ["some-org/some-model", "fake"])
def test_rehearsal_does_not_touch_the_real_output(job, tmp_path, model):
    values = yaml.safe_load(job.read_text()) | {"model": model}
    values["output"]["path"] += "/"
    job.write_text(yaml.safe_dump(values))
    assert run("run", job, "--rehearse") == 0
    assert not (tmp_path / "out").exists()
    assert output_rows(tmp_path / "out-rehearsal") == ROWS


@pytest.mark.model
def test_rehearsal_uses_a_local_tokenizer(job, tmp_path, smollm2_gguf):
    assert run("run", job, "--rehearse", "--set", f"model={smollm2_gguf}", "--set", "output.token_ids=true") == 0
    part = next((tmp_path / "out-rehearsal" / "parts").iterdir())
    assert max(pq.read_table(part).column("prompt_token_ids")[0].as_py()) > 300  # the byte tokenizer has fewer ids


def test_shards_share_the_work(job, tmp_path, monkeypatch, capsys):
    assert run("run", job, "--shard", "0/2") == 0
    assert output_rows(tmp_path / "out") == 20
    assert run("status", job, "--shards", 2) == 0
    status = capsys.readouterr().out
    assert "shard 0/2  2 of 2" in status and "shard 1/2  0 of 1" in status and "not finished" in status
    assert run("verify", job) == 1
    assert "rows 10-19 have no output" in capsys.readouterr().out
    monkeypatch.setenv(OUR_INDEX, "1")
    monkeypatch.setenv(OUR_COUNT, "2")
    assert run("run", job) == 0
    assert run("verify", job) == 0


def test_shard_comes_from_platform_variables(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert run("run", job) == 64
    assert OUR_COUNT in capsys.readouterr().err
    monkeypatch.setenv(OUR_COUNT, "3")
    assert run("run", job) == 0
    assert output_rows(tmp_path / "out") == 10


def test_spool_dir_is_used_and_emptied(job, tmp_path):
    assert run("run", job, "--spool-dir", tmp_path / "spool") == 0
    assert (tmp_path / "spool").is_dir()


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run", "JOB", "--limt", "3"], "--limit"),
        (["run"], "JOB.yaml"),
        (["run", "JOB", "--limit", "many"], "--limit"),
        (["run", "JOB", "--limit", "0"], "--limit"),
        (["run", "JOB", "--log-level", "debug"], "batchinfer --log-level debug run"),
        (["--log-level", "loud", "run", "JOB"], "'loud' is not one of debug"),
        (["run", "JOB", "--set", "seed"], "must be KEY=VALUE"),
        (["run", "JOB", "--shard", "3"], "must be INDEX/COUNT"),
        (["run", "JOB", "--shard", "3/3"], "does not exist"),
        (["status", "OUT", "--set", "seed=1"], "storage.endpoint"),
        (["status", "OUT", "--set", "storage.anonymous=perhaps"], "storage"),
        (["show", "OUT", "--row", "-1"], "--row"),
    ],
)
def test_usage_error_exits_with_64_and_a_message(job, tmp_path, capsys, arguments, message):
    places = {"JOB": str(job), "OUT": str(tmp_path / "out")}
    assert run("--no-log-json", *(places.get(argument, argument) for argument in arguments)) == 64
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["engine.max_num_sqes=4"], 78, "did you mean 'max_num_seqs'?"),
        (["sampling.temprature=1"], 78, "did you mean 'temperature'?"),
        (["prompt.template={{ txet }}"], 78, "'txet' is not in"),
        (["input.path=/nowhere/*.parquet"], 66, "/nowhere/*.parquet"),
        (["model=/no/such/model"], 69, "/no/such/model"),
        (["seed=[1"], 78, "seed"),
        (["input.columns=[id, row]"], 78, "'row'"),
    ],
)
def test_invalid_job_exits_with_its_code_and_message(job, capsys, settings, code, message):
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert run("--no-log-json", "run", job, *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert run("plan", job, *arguments) == code


def test_error_found_in_the_input_names_the_line_of_its_key(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: fake\ninput:\n  path: {tmp_path}/in.jsonl\nprompt:\n  template: '{{{{ txet }}}}'\n"
        f"output:\n  path: {tmp_path}/out\n"
    )
    for command in ("run", "plan"):
        assert run("--no-log-json", command, path) == 78
        assert f"{path}:5: prompt.template: column 'txet' is not in" in capsys.readouterr().err
        assert run("--no-log-json", command, path, "--set", "input.path=nothing*.jsonl") == 66
        assert "--set: input.path: nothing matches" in capsys.readouterr().err


def test_missing_job_file_is_reported(tmp_path, capsys):
    assert run("run", tmp_path / "nothing.yaml") == 78
    assert "nothing.yaml" in capsys.readouterr().err


def test_output_of_another_job_is_refused(job, capsys):
    assert run("run", job) == 0
    capsys.readouterr()
    assert run("--no-log-json", "run", job, "--set", "seed=5") == 73
    assert "seed: was 0, is 5" in capsys.readouterr().err
    assert run("plan", job, "--set", "seed=5") == 73
    assert "exists and belongs to another job" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "verify", "show"])
def test_missing_output_is_reported(tmp_path, command, capsys):
    assert run(command, tmp_path / "nothing") == 66
    assert "no job has written there" in capsys.readouterr().err


def test_error_is_logged_as_json(tmp_path, capsys):
    assert run("--log-json", "run", tmp_path / "nothing.yaml") == 78
    event = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (event["level"], event["error"], event["exit_code"]) == ("error", "SpecError", 78)
    (tmp_path / "broken.yaml").write_text("model: [")
    assert run("--log-json", "run", tmp_path / "broken.yaml") == 78
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"] == "SpecError"  # as errors.py names it


def test_too_many_row_errors_exit_with_10(job, capsys):
    arguments = ["--set", "prompt.template={{ text.missing.attribute }}", "--set", "errors.max=3"]
    assert run("--no-log-json", "run", job, *arguments) == 10
    assert "errors.max" in capsys.readouterr().err


def test_bug_exits_with_70_and_a_traceback(job, capsys, monkeypatch):
    monkeypatch.setattr("batchinfer.job.run.run_job", lambda *_, **__: {}["gone"])
    assert run("run", job) == 70
    err = capsys.readouterr().err
    assert "KeyError" in err and "Traceback" in err and "Please report" in err


# -- as a process --------------------------------------------------------------------------------------------------


def test_closed_pipe_keeps_the_exit_code(job):
    """`batchinfer verify OUTPUT | true` keeps its exit code, and prints no traceback."""
    assert run("run", job, "--shard", "0/2") == 0
    for command, code in (("verify", 1), ("show", 0)):
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run([*CLI, command, str(job)], stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert result.returncode == code
        assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_ascii_locale_prints_escapes(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "für 日本"}\n')
    values = {"model": "fake", "input": {"path": str(tmp_path / "in.jsonl")}, "prompt": {"template": "{{ text }}"}}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**values, "output": {"path": str(tmp_path / "out")}}))
    assert run("run", job) == 0
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([*CLI, "show", str(job)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "f\\xfcr" in result.stdout


def test_sigterm_exits_with_33(job, tmp_path):
    slow = ["--set", "fake.step_s=0.5", "--set", "fake.answer_tokens=400"]
    command = [*CLI, "--log-json", "run", str(job), *slow]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATCHINFER_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    while "phase: running" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 33, err
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["outcome"] == "drained"
