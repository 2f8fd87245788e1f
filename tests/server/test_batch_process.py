"""Batches on a real server process, driven by OpenAI's client: killed, stopped and restarted."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from tests.server.batch_lines import CHAT, ENDED, parsed, rows  # noqa: E402

ROWS = 2000


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """`batchinfer serve` as a separate process."""

    def __init__(self, root, step_s=0.0):
        self.root = root
        self.step_s = step_s
        self.port = free_port()
        self.log = root.parent / "log"
        self.process = None
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="k", max_retries=0)

    def start(self):
        command = [sys.executable, "-c", "from batchinfer.cli.main import process; process()", "serve", "fake"]
        command += ["--port", str(self.port), "--data-dir", str(self.root), "--set", f"fake.step_s={self.step_s}"]
        for setting in ("fake.answer_tokens=[2,12]", "engine.max_num_seqs=32", "engine.max_model_len=4096"):
            command += ["--set", setting]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        give_up = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < give_up, self.log.read_text()
                time.sleep(0.05)

    def end(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(20)

    def upload(self, data):
        return self.client.files.create(file=("in.jsonl", data), purpose="batch")

    def create(self, data, **values):
        file = self.upload(data)
        return self.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **values)

    def begun(self, completed, **values):
        """Start a process and a batch of ROWS rows; return once more than `completed` of them are done."""
        self.step_s = 0.01  # some 6 s of work
        self.start()
        batch = self.create(rows(ROWS), **values)
        return self.wait(batch.id, lambda batch: batch.request_counts.completed > completed)

    def wait(self, batch_id, done, timeout_s=60):
        give_up = time.monotonic() + timeout_s
        while not done(batch := self.client.batches.retrieve(batch_id)):
            assert time.monotonic() < give_up, (batch, self.log.read_text()[-3000:])
            time.sleep(0.02)
        return batch


@pytest.fixture
def process(tmp_path):
    process = Process(tmp_path / "data")
    yield process
    if process.process is not None and process.process.poll() is None:
        process.end()


@pytest.mark.timeout(180)
def test_2000_rows_survive_sigkill(process):
    batch = process.begun(500, metadata={"name": "nightly"})
    for least in (500, 1000):
        process.wait(batch.id, lambda batch, least=least: batch.request_counts.completed > least)
        process.end(signal.SIGKILL)
        process.start()
        assert process.client.batches.retrieve(batch.id).status == "in_progress"
    done = process.wait(batch.id, lambda batch: batch.status in ENDED)
    assert done.status == "completed" and done.metadata == {"name": "nightly"}
    assert done.request_counts.model_dump() == {"total": ROWS, "completed": ROWS, "failed": 0}
    found = parsed(process.client.files.content(done.output_file_id).content)
    assert [row["custom_id"] for row in found] == [f"row-{n}" for n in range(ROWS)]
    assert all(row["response"]["body"]["choices"][0]["message"]["content"] for row in found)


@pytest.mark.timeout(120)
def test_requests_do_not_wait_for_a_batch(process):
    """A batch leaves seats free, and a request that is refused or answered changes nothing in it."""
    batch = process.begun(100)
    for number in range(20):
        messages = [{"role": "user", "content": f"question {number}"}]
        began = time.monotonic()
        answer = process.client.chat.completions.create(model="fake", messages=messages, max_tokens=4)
        assert answer.usage.completion_tokens == 4 or answer.choices[0].finish_reason == "stop"
        assert time.monotonic() - began < 2
    assert process.client.batches.retrieve(batch.id).status == "in_progress"
    process.client.batches.cancel(batch.id)
    done = process.wait(batch.id, lambda batch: batch.status in ENDED)
    assert done.status == "cancelled"


@pytest.mark.timeout(120)
def test_sigterm_saves_what_is_finished(process):
    batch = process.begun(600)
    began = time.monotonic()
    assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert time.monotonic() - began < 8
    assert list((process.root / "work" / batch.id / "salvage").iterdir())
    process.start()
    done = process.wait(batch.id, lambda batch: batch.status in ENDED)
    assert done.status == "completed" and done.request_counts.completed == ROWS


@pytest.mark.timeout(120)
def test_the_real_client_uses_every_route(process):
    process.start()
    client = process.client
    file = process.upload(rows(4))
    assert client.files.retrieve(file.id).bytes == file.bytes == len(client.files.content(file.id).content)
    made = [process.create(rows(3)).id for _ in range(3)]
    done = [process.wait(batch_id, lambda batch: batch.status in ENDED) for batch_id in made]
    assert [batch.status for batch in done] == ["completed"] * 3
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]  # the client pages by itself
    assert len(list(client.files.list(purpose="batch", limit=2))) == 4
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.cancel(made[0])
    assert refused.value.code == "batch_not_cancellable"
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
    failed = process.wait(process.create(b"no json\n").id, lambda batch: batch.status in ENDED)
    assert failed.status == "failed" and failed.errors.data[0].line == 1
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


@pytest.mark.timeout(120)
def test_the_real_client_cancels(process):
    process.step_s = 0.02
    process.start()
    batch = process.create(rows(ROWS))
    process.wait(batch.id, lambda batch: batch.request_counts.completed > 100)
    assert process.client.batches.cancel(batch.id).status == "cancelling"
    done = process.wait(batch.id, lambda batch: batch.status in ENDED)
    assert done.status == "cancelled" and done.request_counts.completed > 100
    counts = done.request_counts
    assert counts.completed + counts.failed == counts.total == ROWS
    found = [parsed(process.client.files.content(name).content) for name in (done.output_file_id, done.error_file_id)]
    assert [len(part) for part in found] == [counts.completed, counts.failed]
    assert {row["custom_id"] for part in found for row in part} == {f"row-{n}" for n in range(ROWS)}
