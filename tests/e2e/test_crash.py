"""A 3,000-row job on a real object store: killed, stopped, and lied to, it ends with the same bytes (Done when 3)."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from batchinfer.cli.main import main
from batchinfer.io.storage import Store
from batchinfer.job.inspect.verify import audit
from batchinfer.job.run import run_job
from batchinfer.spec import parse_spec

ROWS, CHUNK_ROWS, KILLS = 3000, 100, 25
FEW_KILLS = 10  # without --all
FINAL = ("parts/", "commits/", "plan.json", "manifest.json", "_SUCCESS")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("crash") / "in.parquet"
    texts = [None if n % 500 == 3 else f"Row {n} says: " + "abcdefgh "[: n % 9] * (n % 7) for n in range(ROWS)]
    pq.write_table(pa.table({"id": range(ROWS), "text": texts}), path)
    return path


def job(table, output, endpoint, step_s=0.0):
    return {
        "model": "fake",
        "input": {"path": str(table)},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_tokens": 20, "temperature": 1.0},
        "output": {"path": output, "chunk_rows": CHUNK_ROWS},
        "fake": {"answer_tokens": [2, 20], "step_s": step_s},
        "engine": {"max_num_seqs": 64},
        "storage": {"endpoint": endpoint, "region": "us-east-1"},
    }


def final(store):
    """Name → bytes of what must not depend on what happened on the way; parts by name."""
    return {name: store.read(name) for name in store.find() if name.startswith(FINAL)}


@pytest.fixture(scope="module")
def whole(table, seaweed):
    """Run the job without interruption."""
    spec = parse_spec(job(table, f"{seaweed.bucket()}/out", seaweed.endpoint))
    spec = spec.model_copy(update={"storage": seaweed.storage})
    run_job(spec)
    return final(Store.open(spec.output.path, spec.storage))


def _child(arguments, env, log):
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stderr.fileno())
    sys.exit(main(arguments))


class Job:
    """A job in processes of its own, as a scheduler would start it again and again.

    They are forked from a process that has everything imported and nothing running: the 60 starts of this module
    cost milliseconds and not seconds. tests/job/test_drain.py starts real interpreters.
    """

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.e2e.test_crash", "batchinfer.job.run", "batchinfer.llm", "s3fs"])

    def __init__(self, folder, values, env):
        self.path = folder / "job.yaml"
        self.path.write_text(yaml.safe_dump(values))
        self.env = env
        self.log = folder / "log"

    def start(self):
        process = self.processes.Process(target=_child, args=(["run", str(self.path)], self.env, str(self.log)))
        process.start()
        return process

    def finish(self):
        process = self.start()
        process.join(100)
        assert process.exitcode == 0, self.log.read_text()[-4000:]


def check(store, storage, whole):
    assert final(store) == whole
    result = audit(store.url, storage)
    assert not result.differences, result.differences[:3]
    assert result.rows == ROWS


@pytest.mark.timeout(300)
def test_kills_and_restarts_lose_and_repeat_no_row(tmp_path, table, seaweed, whole, pytestconfig):
    url = f"{seaweed.bucket()}/out"
    runs = Job(tmp_path, job(table, url, seaweed.endpoint, step_s=0.003), seaweed.env)
    store = Store.open(url, seaweed.storage)
    rng = random.Random(17)
    startup_s = 0.0
    for number in range(KILLS if pytestconfig.getoption("--all") else FEW_KILLS):
        process = runs.start()
        began = time.monotonic()
        if number == 0:  # how long it takes to begin, which the moments below are measured from
            while not store.find("commits/"):
                assert process.is_alive() and time.monotonic() - began < 60, runs.log.read_text()
                time.sleep(0.02)
            startup_s = time.monotonic() - began
        else:
            time.sleep(rng.uniform(0.2 * startup_s, 1.5 * startup_s))
        process.kill()
        process.join()
    assert store.find("commits/")
    runs.finish()
    check(store, seaweed.storage, whole)


@pytest.mark.timeout(300)
def test_sigterm_exits_33_in_time_and_loses_nothing(tmp_path, table, seaweed, whole):
    url = f"{seaweed.bucket()}/out"
    runs = Job(tmp_path, job(table, url, seaweed.endpoint, step_s=0.01), seaweed.env)
    store = Store.open(url, seaweed.storage)
    for _ in range(4):
        commits = len(store.find("commits/"))
        process = runs.start()
        began = time.monotonic()
        while len(store.find("commits/")) <= commits:
            assert process.is_alive() and time.monotonic() - began < 60, runs.log.read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        signalled = time.monotonic()
        process.join(20)
        assert process.exitcode == 33, runs.log.read_text()[-4000:]
        assert time.monotonic() - signalled < 8
        assert store.find("salvage/") and b'"drained"' in store.read("report.json")
    runs.finish()
    check(store, seaweed.storage, whole)


@pytest.mark.timeout(300)
def test_a_store_that_fails_one_request_in_five_costs_no_row(tmp_path, table, seaweed, faults, whole):
    url = f"{seaweed.bucket()}/out"
    faults.rate = 0.2
    runs = Job(tmp_path, job(table, url, faults.endpoint), seaweed.env)
    runs.finish()
    store = Store.open(url, seaweed.storage)
    check(store, seaweed.storage, whole)
    assert len(faults.seen) > ROWS // CHUNK_ROWS * 2


@pytest.mark.timeout(300)
def test_losing_the_response_of_every_commit_once_costs_no_row(tmp_path, table, seaweed, faults, whole):
    url = f"{seaweed.bucket()}/out"
    for chunk in range(ROWS // CHUNK_ROWS):
        faults.add("lose", method="PUT", contains=f"commits/{chunk:06d}")
    runs = Job(tmp_path, job(table, url, faults.endpoint), seaweed.env)
    runs.finish()
    check(Store.open(url, seaweed.storage), seaweed.storage, whole)
    assert not [fault for fault in faults.faults if fault.times]


@pytest.mark.timeout(120)
def test_a_store_that_ignores_conditions_is_named_and_used(table, unconditional, whole, capsys):
    values = job(table, f"{unconditional.bucket()}/out", unconditional.endpoint)
    spec = parse_spec(values).model_copy(update={"storage": unconditional.storage})
    run_job(spec)
    assert "does not refuse to replace an object" in capsys.readouterr().err
    assert final(Store.open(spec.output.path, spec.storage)) == whole


@pytest.mark.parametrize(("change", "code", "words"), [("secret", 77, "secret"), ("bucket", 66, "no-such-bucket")])
def test_mistakes_of_access_have_their_own_exit_codes(tmp_path, table, seaweed, change, code, words):
    url = "s3://no-such-bucket" if change == "bucket" else seaweed.bucket()
    env = {**seaweed.env, "AWS_SECRET_ACCESS_KEY": "wrong"} if change == "secret" else seaweed.env
    runs = Job(tmp_path, job(table, f"{url}/out", seaweed.endpoint), env)
    process = runs.start()
    process.join(60)
    said = runs.log.read_text()
    assert process.exitcode == code, said[-2000:]
    assert words in said.lower() and "Traceback" not in said
