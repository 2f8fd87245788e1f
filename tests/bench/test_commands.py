"""`batchinfer bench` from the command line: what it counts, the keys of its JSON, and every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.job.outputs import ROWS, write_input

MACHINE_KEYS = {
    *("cpu", "cores", "threads", "kernels", "torch", "batchinfer", "date", "dtype", "gemm_per_s", "read_bytes_per_s"),
    *("copy_bytes_per_s", "buffer_bytes", "caches", "load_average", "int8_per_s"),
}
RUN_KEYS = {
    *("seconds", "runner_s", "prompt_tokens", "computed_tokens", "reused_tokens", "generated_tokens", "answer_tokens"),
    *("steps", "mean_batch", "preemptions", "errors", "limit", "total_tokens_per_s", "prompt_tokens_per_s"),
    *("answer_tokens_per_s", "share_of_limit", "draft_tokens", "accepted_tokens"),
}
SHORT = ("--input-tokens", "20", "--output-tokens", "5")


def read(path: Path) -> dict:
    found = json.loads(path.read_text())
    assert set(found["machine"]) == MACHINE_KEYS and isinstance(found["notes"], list)
    return found


# -- throughput ----------------------------------------------------------------------------------------------------


def test_throughput_of_random_prompts_counts_tokens(bench, tiny_model, tmp_path, capsys):
    out = tmp_path / "x.json"
    arguments = ("--requests", 12, *SHORT, "--shared-prefix", 16, "--repeat", 2, "--set", "engine.block_size=4")
    assert bench("throughput", tiny_model, *arguments, "--json", out) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("machine ") and "for the linear layers alone" in text and "12 requests of random tokens" in text
    )
    found = read(out)
    assert set(found) == {
        *(
            "command",
            "machine",
            "gemm_per_s_after",
            "other_cores",
            "notes",
            "model",
            "workload",
            "runs",
            "median",
            "first_error",
        ),
        *("weight_bytes", "weight_bytes_per_s"),
    }
    assert found["command"] == "throughput" and found["model"] == str(tiny_model) and found["first_error"] == ""
    assert len(found["runs"]) == 2 and found["median"] in found["runs"]
    assert found["weight_bytes"] == 4 * (4 * 7680 + 3072)
    for run in found["runs"]:  # the second begins with an empty cache as well
        assert set(run) == RUN_KEYS
        assert (run["prompt_tokens"], run["reused_tokens"]) == (12 * 20, 11 * 16)
        assert run["computed_tokens"] == 12 * 20 - 11 * 16
        assert run["generated_tokens"] == run["answer_tokens"] == 12 * 5
        assert (run["errors"], run["preemptions"]) == (0, 0)
        assert run["mean_batch"] * run["steps"] == pytest.approx(60)
        assert 0 < run["runner_s"] < run["seconds"]
        limit = run["limit"]
        assert max(limit["arithmetic_s"], limit["weights_s"]) <= limit["seconds"]
        assert run["share_of_limit"] == pytest.approx(limit["seconds"] / run["seconds"])
        # 7,680 weights in each of 4 layers, for tokens computed; 3,072 in the head, for tokens sampled
        computed = run["computed_tokens"] + 12 * (5 - 1)
        operations = 2 * (4 * 7680 * computed + 3072 * 60)
        assert limit["arithmetic_s"] == pytest.approx(operations / found["machine"]["gemm_per_s"])
        # every step of this run samples, as all prompts fit the first one
        weights_s = run["steps"] * found["weight_bytes"] / found["weight_bytes_per_s"]
        assert limit["weights_s"] == pytest.approx(weights_s)


def test_throughput_runs_a_workload_file(bench, tiny_model, tmp_path, capsys):
    path, out = tmp_path / "w.jsonl", tmp_path / "x.json"
    path.write_text("".join(json.dumps({"id": n, "ids": [n + 3] * 9, "max_tokens": n + 1}) + "\n" for n in range(6)))
    assert bench("throughput", tiny_model, "--workload", path, "--requests", 4, "--json", out) == 0
    run = read(out)["median"]
    assert (run["prompt_tokens"], run["answer_tokens"]) == (36, 1 + 2 + 3 + 4)
    assert f"{path}: 4 requests" in capsys.readouterr().out


def test_throughput_without_a_model_has_no_limit(bench, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert bench("throughput", "fake", "--requests", 5, *SHORT, "--json", out) == 0
    run = read(out)["median"]
    assert (run["answer_tokens"], run["limit"], run["share_of_limit"]) == (25, None, None)
    assert "limit" not in capsys.readouterr().out


@pytest.fixture
def job(tmp_path) -> Path:
    write_input(tmp_path)
    values = {
        "model": "fake",
        "input": {"path": str(tmp_path / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_tokens": 7, "ignore_eos": True},
        "output": {"path": str(tmp_path / "out"), "chunk_rows": 10},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((), ROWS),
        (("--requests", 13), 13),
        (("--requests", 999), ROWS),
        (("--set", "input.limit=4"), 4),
        (("--set", "input.limit=9999"), ROWS),
    ],
)
def test_throughput_runs_the_first_rows_of_a_job(bench, job, tmp_path, arguments, rows):
    out = tmp_path / "x.json"
    assert bench("throughput", job, *arguments, "--json", out) == 0
    found = read(out)
    assert found["median"]["answer_tokens"] == 7 * rows and f"first {rows} rows" in found["workload"]
    assert not (tmp_path / "out").exists()


def test_throughput_counts_rows_in_error(bench, job, tmp_path, capsys):
    out = tmp_path / "x.json"
    template = "prompt.template={{ text if text != 'question 3' else text.x.y }}"
    assert bench("throughput", job, "--set", template, "--json", out) == 0
    found = read(out)
    assert found["median"]["errors"] == 1 and found["first_error"]
    assert "1 requests failed, the first: " in capsys.readouterr().out
    assert bench("throughput", job, "--set", "prompt.template={{ text.x.y }}") == 65
    assert "every request fails" in capsys.readouterr().err


# -- latency -------------------------------------------------------------------------------------------------------


def test_latency_reports_times_per_batch(bench, tiny_model, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert bench("latency", tiny_model, *SHORT, "--batch", "1,3", "--repeat", 2, "--json", out) == 0
    assert "first token" in capsys.readouterr().out
    found = read(out)
    assert set(found) == {
        *(
            "command",
            "machine",
            "gemm_per_s_after",
            "other_cores",
            "notes",
            "model",
            "input_tokens",
            "output_tokens",
            "results",
        )
    }
    assert (found["input_tokens"], found["output_tokens"]) == ([20, 20], [5, 5])
    assert [result["batch"] for result in found["results"]] == [1, 3]
    for result, requests in zip(found["results"], (2, 6), strict=True):
        assert result["requests"] == result["first_token_s"]["count"] == result["per_token_s"]["count"] == requests
        assert result["gap_s"]["count"] == 4 * requests
        spread = result["per_token_s"]
        assert set(spread) == {"count", "min", "median", "p90", "p99"}
        assert 0 < spread["min"] <= spread["median"] <= spread["p90"] <= spread["p99"]
        assert result["per_token_limit_s"] > 0 and result["first_token_limit_s"] > 0


def test_latency_of_one_token_has_no_later_tokens(bench, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert bench("latency", "fake", "--output-tokens", "1", "--repeat", 1, "--batch", "2", "--json", out) == 0
    result = read(out)["results"][0]
    assert (result["per_token_s"], result["gap_s"], result["per_token_limit_s"]) == (None, None, None)
    assert "gap" not in capsys.readouterr().out


def test_latency_step_never_exceeds_the_batch(tiny_model):
    from batchinfer.bench import latency
    from batchinfer.bench.measured import load_subject
    from batchinfer.bench.workload import Synthetic, TokenSpan
    from batchinfer.cli.options import model_spec
    from tests.bench.test_figures import make_machine

    subject = load_subject(model_spec(str(tiny_model), []))
    plan = latency.Plan(Synthetic(input_tokens=TokenSpan(4, 9), output_tokens=TokenSpan(1, 9)), [3], 5)
    latency.measure(subject, plan, 3, make_machine())
    batches = [step.sequences for step in subject.llm.steps]
    assert max(batches) == 3 and sum(batches) >= 15 and batches.count(3) > len(batches) // 2


# -- host and kernels ----------------------------------------------------------------------------------------------


def test_host_reports_parts_of_a_step(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("batchinfer.bench.host._BUDGET_S", 0.0)
    monkeypatch.setattr("batchinfer.bench.device_host._STEPS", 20)
    out = tmp_path / "x.json"
    assert bench("host", "--sequences", "2,8", "--json", out) == 0
    assert "ms/step" in capsys.readouterr().out
    found = read(out)
    assert found["machine"]["threads"] == 1
    cases = [(row["sequences"], row["edited"], row["depth"]) for row in found["device"]]
    assert cases == [(count, edited, depth) for count in (2, 8) for edited in (False, True) for depth in (0, 1)]
    for row in found["device"]:
        assert row["device_ms"] == 1 and row["steps"] == 20 and row["gap_ms"] >= 0 and row["host_ms"] > 0
        assert row["depth"] or row["gap_ms"] > 0, "without a step ahead the device waits for the host"
    first, second = found["results"]
    parts = ("queue_ms", "schedule_ms", "build_ms", "sample_ms", "update_ms")
    more = {
        "sequences",
        "steps",
        "total_ms",
        "total_p90_ms",
        "total_with_stop_ms",
        "stop_checks_ms",
        "us_per_sequence",
        "growth",
    }
    assert set(first) == {*parts, *more}
    assert (first["sequences"], first["growth"], second["sequences"]) == (2, None, 8)
    assert second["growth"] == pytest.approx(second["total_ms"] / first["total_ms"] / 4)
    assert all(0 < row[part] < row["total_ms"] for row in (first, second) for part in parts)


def test_kernels_reports_every_op(bench, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("batchinfer.bench.kernels._BUDGET_S", 0.0)
    monkeypatch.setattr("batchinfer.bench.kernels._CONTEXT", 20)
    monkeypatch.setattr("batchinfer.bench.kernels._PROMPT", 20)
    monkeypatch.setattr("batchinfer.bench.kernels._ROWS", (1, 3))
    out = tmp_path / "x.json"
    assert bench("kernels", tiny_model, "--threads", 1, "--json", out) == 0
    assert "times limit" in capsys.readouterr().out
    found = read(out)
    assert found["shapes"] == str(tiny_model) and found["machine"]["threads"] == 1
    keys = {"op", "shape", "backend", "min_s", "median_s", "samples", "limit_s", "bound", "data_bytes", "operations"}
    assert all(set(row) == keys | {"fits", "times_over_limit"} for row in found["results"])
    linears = [row["shape"] for row in found["results"] if row["op"] == "linear"]
    assert "qkv 32x64, 3 rows" in linears and "lm_head 32x96, 1 rows" in linears


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["throughput"], 64, "MODEL"),
        (["throghput"], 64, "Did you mean 'throughput'?"),
        (["throughput", "fake", "--request", "3"], 64, "--request"),
        (["throughput", "fake", "--requests", "0"], 64, "--requests"),
        (["throughput", "fake", "--input-tokens", "9-3"], 64, "--input-tokens 9-3"),
        (["throughput", "fake", "--output-tokens", "x"], 64, "--output-tokens x"),
        (["throughput", "fake", "--input-tokens", "40000"], 64, "the context has 32768"),
        (["throughput", "fake", "--shared-prefix", "128"], 64, "--shared-prefix 128"),
        (["throughput", "fake", "--workload", "nothing.jsonl"], 66, "nothing.jsonl"),
        (["throughput", "fake", "--workload", "W", "--seed", "1"], 64, "--seed: a workload file has"),
        (["throughput", "fake", "--workload", "W"], 65, "w.jsonl:1: ids: token 999 is not in"),
        (["throughput", "fake", "--set", "engine.max_num_sqes=4"], 78, "did you mean 'max_num_seqs'?"),
        (["throughput", "fake", "--set", "sampling.temperature=1"], 64, "--set sampling.temperature"),
        (["throughput", "fake", "--set", "engine"], 64, "must be KEY=VALUE"),
        (["throughput", "/no/such/model"], 69, "/no/such/model"),
        (["throughput", "fake", "--json", "/no/such/folder/x.json"], 64, "--json /no/such/folder/x.json"),
        (["throughput", "nothing.yaml"], 78, "nothing.yaml"),
        (["throughput", "JOB", "--workload", "W"], 64, "--workload: a job has its own input"),
        (["throughput", "JOB", "--input-tokens", "3"], 64, "--input-tokens: a job has its own input"),
        (["throughput", "JOB", "--set", "prompt.template={{ txet }}"], 78, "'txet' is not in"),
        (["latency", "fake", "--batch", "0"], 64, "--batch 0"),
        (["latency", "fake", "--batch", "300"], 64, "more than engine.max_num_seqs"),
        (["latency", "fake", "--batch", "8", "--set", "engine.kv_cache_tokens=1024"], 64, "do not fit the KV cache"),
        (["latency", "fake", "--set", "engine.max_num_seqs=0"], 78, "engine.max_num_seqs"),
        (["host", "--sequences", "4,2"], 64, "--sequences 4,2"),
        (["host", "--sequences", "0,2"], 64, "--sequences 0,2"),
        (["host", "--sequences", "2,x"], 64, "--sequences 2,x"),
        (["host", "--sequences", "99999"], 64, "65536"),
        (["kernels", "--threads", "0"], 64, "--threads"),
        (["kernels", "/no/such/model"], 69, "/no/such/model"),
    ],
)
def test_invalid_option_is_refused(bench, job, tmp_path, capsys, arguments, code, message):
    (tmp_path / "w.jsonl").write_text('{"ids": [999], "max_tokens": 4}\n')
    places = {"JOB": str(job), "W": str(tmp_path / "w.jsonl")}
    assert bench(*(places.get(argument, argument) for argument in arguments)) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert "machine" not in captured.out, "measured before it was looked at"
