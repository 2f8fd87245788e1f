"""Signals to a real process: it saves what is finished and leaves with 33 in time, whatever hangs."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from batchinfer.errors import Drained
from batchinfer.job.drain import Drain
from tests.job.doubles import ScriptedLLM, job, run, snapshot, write_parquet

RUN = "from batchinfer.cli.main import process; process()"
# a store whose uploads never end
HANGING = """
import sys, time
from batchinfer.io.storage import LocalStore
LocalStore.put_file = lambda *_: time.sleep(1000)
"""


def write_job(tmp_path, name="job.yaml", **sections):
    spec = job(tmp_path, **sections).model_dump(mode="json", exclude_none=True)
    (tmp_path / name).write_text(yaml.safe_dump(spec))
    return tmp_path / name


def start(path, code=RUN):
    return subprocess.Popen([sys.executable, "-c", code, "run", str(path)], stderr=subprocess.PIPE, text=True)


def wait_for(found, process, limit_s=30):
    end = time.monotonic() + limit_s
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.02)


def leave(process, limit_s):
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 33, errors
    assert time.monotonic() - began < limit_s
    return errors


def test_sigterm_saves_and_the_next_run_continues(tmp_path):
    write_parquet(tmp_path / "in.parquet", 60)
    slow = write_job(tmp_path, fake={"step_s": 0.05})
    process = start(slow)
    wait_for(lambda: len(list(tmp_path.glob("out/commits/*.json"))) >= 2, process)
    process.send_signal(signal.SIGTERM)
    errors = leave(process, 8)
    assert "SIGTERM" in errors
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["outcome"], report["exit_code"]) == ("drained", 33)
    assert 0 < report["rows"]["run"] < 60
    llm = ScriptedLLM()
    recovered = run(job(tmp_path), llm).rows
    assert recovered["committed_before"] + recovered["recovered"] + recovered["run"] == 60
    assert recovered["committed_before"] + recovered["recovered"] >= report["rows"]["run"] - 2


def test_a_step_that_hangs_does_not_lose_the_finished_rows(tmp_path):
    write_parquet(tmp_path / "in.parquet", 60)
    code = f"""
from batchinfer.engine import fake
import pathlib, time
run = fake.FakeRunner.launch
def hang(self, plan, *rest):
    if plan.step == 150:
        pathlib.Path({str(tmp_path)!r}, "hangs").touch()
        time.sleep(1000)
    return run(self, plan, *rest)
fake.FakeRunner.launch = hang
"""
    # answers of 1 to 200 tokens: some rows of a chunk are done, its longest is not
    engine = {"max_num_seqs": 64, "speculative_tokens": 0}  # at least 150 steps
    sections = {"fake": {"answer_tokens": [1, 200]}, "sampling": {"max_tokens": 200}, "engine": engine}
    process = start(write_job(tmp_path, **sections), code + RUN)
    wait_for(lambda: (tmp_path / "hangs").exists(), process)
    process.send_signal(signal.SIGUSR1)
    leave(process, 8)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["outcome"] == "drained" and report["rows"]["run"] > 0
    rows = run(job(tmp_path, **sections), ScriptedLLM()).rows
    assert rows["committed_before"] + rows["recovered"] == report["rows"]["run"]


def test_a_store_that_hangs_does_not_hold_the_process(tmp_path):
    write_parquet(tmp_path / "in.parquet", 60)
    process = start(write_job(tmp_path, fake={"step_s": 0.05}), HANGING + RUN)
    wait_for(lambda: list(tmp_path.glob("out/job.json")), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    leave(process, 8)


def test_a_second_signal_leaves_at_once(tmp_path):
    write_parquet(tmp_path / "in.parquet", 60)
    process = start(write_job(tmp_path, fake={"step_s": 0.05}), HANGING + RUN)
    wait_for(lambda: list(tmp_path.glob("out/job.json")), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    leave(process, 1.5)


def test_a_signal_while_the_model_loads_ends_the_process_in_time(tmp_path):
    write_parquet(tmp_path / "in.parquet", 10)
    code = "import time, batchinfer.llm; batchinfer.llm.LLM.from_spec = lambda *_: time.sleep(1000)\n"
    process = start(write_job(tmp_path), code + RUN)
    wait_for(lambda: list(tmp_path.glob("out/job.json")), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    leave(process, 4)
    assert json.loads((tmp_path / "out/report.json").read_text())["outcome"] == "drained"


def test_kill_9_at_random_moments_on_local_disk(tmp_path):
    write_parquet(tmp_path / "in.parquet", 300)
    output = {"chunk_rows": 10}
    run(job(tmp_path, output={**output, "path": str(tmp_path / "whole")}))
    path = write_job(tmp_path, output=output, fake={"step_s": 0.01})
    rng = random.Random(5)
    for _ in range(5):
        process = start(path)
        time.sleep(rng.uniform(0.4, 1.6))
        process.kill()
        process.communicate()
    run(job(tmp_path, output=output))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


# -- the object itself


def test_request_runs_the_saving_once_and_raises_in_the_loop():
    left, saved = [], threading.Event()
    drain = Drain(deadline_s=0.3, leave=left.append)
    drain.on_request(saved.set)
    drain.raise_if_requested()
    drain.request("test")
    drain.wait_saved()
    assert saved.is_set() and drain.requested
    with pytest.raises(Drained):
        drain.raise_if_requested()
    time.sleep(0.5)
    assert left == [33]
    drain.request("again")
    assert left == [33, 33]


def test_work_in_a_thread_returns_raises_or_is_interrupted():
    drain = Drain(deadline_s=100, leave=lambda code: None)
    assert drain.run_in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        drain.run_in_thread(lambda: 1 // 0)
    release = threading.Event()
    threading.Timer(0.2, lambda: drain.request("test")).start()
    with pytest.raises(Drained):
        drain.run_in_thread(lambda: release.wait(20))
    release.set()


def test_a_saving_that_fails_is_a_warning(capsys):
    drain = Drain(deadline_s=100, leave=lambda code: None)
    drain.on_request(lambda: 1 // 0)
    drain.request("test")
    drain.wait_saved()
    assert "could not save" in capsys.readouterr().err


def test_the_drain_module_imports_nothing_heavy():
    code = "import sys, batchinfer.job.drain, batchinfer.job.shard\n"
    code += "print('pyarrow' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.split() == ["False", "False"]
