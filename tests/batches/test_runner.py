"""Batches over the job core: cancelling, expiring, restarts, failures of the disk, and what stays behind."""

import threading
import time

import pytest

from batchinfer.batches import runner as batch_module
from batchinfer.batches.catalog import BatchRecord, Catalog, new_id
from batchinfer.batches.runner import BatchRunner
from batchinfer.batches.validate import check_lines
from batchinfer.errors import OutputConflict, StorageError, UsageError
from batchinfer.job.spool import Spool
from tests.job.doubles import ScriptedLLM
from tests.server.batch_lines import CHAT, content, gone, line, parsed, rows

JOB = {"model": "fake"}


class Service:
    """A catalog and a runner, as a server has them; `restart` is what another process would do."""

    def __init__(self, root, llm=None):
        self.root = root
        self.begin(llm)

    def begin(self, llm=None, start=True):
        self.catalog = Catalog(self.root)
        self.runner = BatchRunner(self.catalog, llm or ScriptedLLM(), JOB, {"fake"})
        if start:
            self.runner.start()

    def end(self):
        self.runner.close(5.0)
        self.catalog.close()

    def restart(self, llm=None):
        self.end()
        self.begin(llm)

    def add(self, data, window_s=3600):
        path = self.catalog.temporary()
        path.write_bytes(data)
        file = self.catalog.add_file(path, "in.jsonl", "batch")
        expires_at = int(time.time()) + window_s
        record = BatchRecord(new_id("batch_"), CHAT, file.id, "1h", expires_at, None)
        self.catalog.add_batch(record)
        self.runner.submit(record.id)
        return record.id

    def wait(self, batch_id, *statuses, until=None, timeout_s=20):
        give_up = time.monotonic() + timeout_s
        while True:
            record = self.catalog.batch(batch_id)
            if (record.status in statuses or (not statuses and record.ended)) and (until is None or until(record)):
                return record
            assert time.monotonic() < give_up, record
            time.sleep(0.01)

    def results(self, record):
        files = (record.output_file_id, record.error_file_id)
        return [parsed(self.catalog.content(file).read_bytes()) if file else [] for file in files]


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path / "data")
    yield service
    service.end()


class Gate:
    """An `after` of ScriptedLLM that holds the model at the k-th answer until it is opened."""

    def __init__(self, at):
        self.at = at
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, done):
        if done == self.at:
            self.reached.set()
            assert self.opened.wait(20)


def ids(lines):
    return [each["custom_id"] for each in lines]


def test_cancelling_keeps_what_is_finished_and_says_what_is_not(tmp_path):
    gate = Gate(1200)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    batch_id = service.add(rows(3000))
    assert gate.reached.wait(20)
    assert service.runner.cancel(batch_id).status == "cancelling"
    assert service.runner.cancel(batch_id).status == "cancelling"
    gate.opened.set()
    record = service.wait(batch_id)
    assert record.status == "cancelled" and record.times["cancelling"] <= record.times["cancelled"]
    good, bad = service.results(record)
    assert ids(good) + ids(bad) == [f"row-{n}" for n in range(3000)] and 1199 <= len(good) <= 1201
    assert record.counts == (3000, len(good), len(bad))
    assert {(each["response"], each["error"]["code"]) for each in bad} == {(None, "batch_cancelled")}
    assert service.runner.cancel(batch_id) is None
    assert gone(service.catalog.work(batch_id))
    service.end()


def test_cancelling_survives_a_restart(tmp_path):
    gate = Gate(700)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    batch_id = service.add(rows(1000))
    assert gate.reached.wait(20)
    service.catalog.move(batch_id, "cancelling", "in_progress")  # and the process dies before its job hears of it
    gate.opened.set()
    service.restart()
    record = service.wait(batch_id)
    good, bad = service.results(record)
    assert record.status == "cancelled" and len(good) + len(bad) == 1000 and len(good) >= 500
    service.end()


def test_a_waiting_batch_is_cancelled_at_once(tmp_path):
    gate = Gate(1)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    first, second = service.add(rows(3)), service.add(rows(3))
    assert gate.reached.wait(20)
    service.wait(second, "in_progress")
    assert service.runner.cancel(second).status == "cancelled"
    gate.opened.set()
    assert service.wait(first).status == "completed"
    assert service.catalog.batch(second).output_file_id is None
    service.end()


def test_a_batch_expires_with_what_it_has(tmp_path):
    gate = Gate(600)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    batch_id = service.add(rows(1000), window_s=2)
    assert gate.reached.wait(20)
    time.sleep(2.5)
    gate.opened.set()
    record = service.wait(batch_id)
    good, bad = service.results(record)
    assert record.status == "expired" and len(good) + len(bad) == 1000 and 599 <= len(good) <= 601
    assert {each["error"]["code"] for each in bad} == {"batch_expired"}
    service.end()


def test_batches_run_in_the_order_of_their_creation(tmp_path):
    gate, llm = Gate(1), ScriptedLLM()
    llm.after = gate
    service = Service(tmp_path, llm)
    made = [service.add(content([line(f"{n}-{k}") for k in range(3)])) for n in range(4)]
    assert gate.reached.wait(20)
    gate.opened.set()
    for batch_id in made:
        assert service.wait(batch_id).status == "completed"
    asked = [prompt.contents[0][0]["content"] for prompt in llm.seen]
    assert asked == [f"Row {n}-{k}" for n in range(4) for k in range(3)]
    assert [record.id for record in service.catalog.batches()] == made[::-1]
    service.end()


def test_a_stopped_service_goes_on_where_it_was(tmp_path):
    gate = Gate(1700)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    batch_id, waiting = service.add(rows(2000)), service.add(rows(5))
    assert gate.reached.wait(20)
    counts = service.wait(batch_id, "in_progress", until=lambda record: record.counts.completed >= 1000).counts
    assert counts.total == 2000 and counts.failed == 0
    threading.Timer(0.2, gate.opened.set).start()
    second = ScriptedLLM()
    service.restart(second)
    record = service.wait(batch_id)
    assert record.status == "completed" and record.counts == (2000, 2000, 0)
    assert ids(service.results(record)[0]) == [f"row-{n}" for n in range(2000)]
    assert service.wait(waiting).status == "completed"
    assert len(second.seen) <= 2000 + 5 - 1699, "finished rows are not run again"
    service.end()


def test_errors_of_an_earlier_process_are_counted(tmp_path):
    gate = Gate(1200)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    wrong = [line(n, **({"body": {"temperature": -1}} if n % 4 == 0 else {})) for n in range(2000)]
    batch_id = service.add(content(wrong))
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.opened.set).start()
    again = Gate(100)
    service.restart(ScriptedLLM(after=again))
    assert again.reached.wait(20)
    record = service.wait(batch_id, "in_progress", until=lambda record: record.counts.total == 2000)
    service.wait(batch_id, "in_progress", until=lambda record: record.counts.failed >= 290)
    again.opened.set()
    record = service.wait(batch_id)
    assert record.counts == (2000, 1500, 500)
    service.end()


def test_a_restart_with_another_model_fails_the_batch_and_keeps_its_rows(tmp_path):
    gate = Gate(1200)
    service = Service(tmp_path, ScriptedLLM(after=gate))
    batch_id = service.add(rows(2000))
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.opened.set).start()
    service.end()
    service.begin(start=False)
    service.runner._job = {**JOB, "sampling": {"temperature": 0.5}}
    service.runner.start()
    record = service.wait(batch_id)
    assert record.status == "failed" and "other settings" in record.problems[0].message
    assert str(service.catalog.work(batch_id)) in record.problems[0].message
    assert list((service.catalog.work(batch_id) / "commits").iterdir())
    service.restart()
    assert service.catalog.work(batch_id).exists()
    service.end()


def test_a_disk_that_fails_for_a_while_delays_a_batch(service, monkeypatch):
    monkeypatch.setattr(batch_module, "_RETRY_S", (0.01, 0.01))
    real, failures = batch_module.run_job, [StorageError("no space left on the device"), OSError(28, "No space left")]

    def flaky(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(batch_module, "run_job", flaky)
    assert service.wait(service.add(rows(10))).status == "completed" and not failures


@pytest.mark.parametrize(
    ("error", "words"),
    [(StorageError("no space left on the device"), "no space"), (RuntimeError("secret"), "internal")],
)
def test_a_failure_that_stays_ends_the_batch_and_not_the_runner(service, monkeypatch, error, words):
    monkeypatch.setattr(batch_module, "_RETRY_S", (0.01,))

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "run_job", fail)
        record = service.wait(service.add(rows(1)))
        assert record.status == "failed" and words in record.problems[0].message
        assert "secret" not in record.problems[0].message
    assert service.wait(service.add(rows(1))).status == "completed"


def test_death_while_results_are_stored_stores_them_once(tmp_path, monkeypatch):
    class Death(BaseException):
        pass

    service = Service(tmp_path)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    real = Catalog.add_file

    def dies(self, temporary, filename, *rest):
        made = real(self, temporary, filename, *rest)
        if filename.endswith("_output.jsonl"):
            raise Death
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "add_file", dies)
        batch_id = service.add(rows(10))
        service.wait(batch_id, "finalizing", until=lambda _: not service.runner._threads[1].is_alive())
    service.restart()
    record = service.wait(batch_id)
    assert record.status == "completed" and len(service.results(record)[0]) == 10
    assert len([file for file in service.catalog.files() if file.purpose == "batch_output"]) == 1
    service.end()


def test_one_process_at_a_time_has_a_catalog(service):
    with pytest.raises(UsageError, match="another process"):
        Catalog(service.root)


def test_a_catalog_sweeps_what_a_kill_left(tmp_path):
    catalog = Catalog(tmp_path)
    path = catalog.temporary()
    path.write_bytes(b"kept")
    kept = catalog.add_file(path, "a", "batch")
    catalog.temporary().write_bytes(b"an upload")
    path = catalog.temporary()
    path.write_bytes(b"lost")
    lost = catalog.add_file(path, "b", "batch")
    catalog.content(lost.id).unlink()  # killed between record and content
    catalog.close()
    catalog = Catalog(tmp_path)
    assert {file.name for file in (tmp_path / "files").iterdir()} == {f"{kept.id}.content", f"{kept.id}.json"}
    assert not list((tmp_path / ".tmp").iterdir()) and catalog.files() == [kept]
    catalog.close()


def test_a_content_that_cannot_be_kept_leaves_no_record(tmp_path):
    catalog = Catalog(tmp_path)
    (tmp_path / "upload").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        catalog.add_file(tmp_path / "upload", "a", "batch")
    path = catalog.temporary()
    path.write_bytes(b"x")
    taken = f"file-{'0' * 32}"
    catalog.content(taken).mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        catalog.add_file(path, "a", "batch", taken)
    assert [file.name for file in (tmp_path / "files").iterdir()] == [f"{taken}.content"] and not catalog.files()
    catalog.close()


def test_a_damaged_record_is_named(tmp_path):
    Catalog(tmp_path).close()
    name = f"batch_{'1' * 32}.json"
    for damaged in ("{", "[]", "{}", '{"id": "batch_2", "problems": [], "counts": []}'):
        (tmp_path / "batches" / name).write_text(damaged)
        with pytest.raises(OutputConflict, match=rf"{name}: damaged"):
            Catalog(tmp_path)


@pytest.mark.parametrize("name", ["files/a.txt", "files/x/file-1.json", "batches/list.json", "work/today/notes"])
def test_a_folder_where_others_keep_files_under_our_names_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    with pytest.raises(OutputConflict, match=f"holds {name}, which is not an endpoint's"):
        Catalog(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_other_files_beside_the_records_stay(service):
    batch = service.add(rows(3))
    service.wait(batch)
    theirs = [service.root / name for name in ("files/a.json", "batches/b.json", "work/c", ".tmp/d", "files/e.content")]
    for path in theirs:
        path.write_text("theirs")
    service.restart()
    assert service.catalog.batch(batch).status == "completed" and len(service.catalog.files()) == 2
    assert [path.read_text() for path in theirs] == ["theirs"] * 5


def test_what_somebody_put_into_the_folder_of_a_batch_outlives_it(service):
    seen = []

    def meanwhile(done):
        (service.catalog.work(batch) / "notes.txt").write_text("theirs")
        seen.append(done)

    service.restart(ScriptedLLM(after=meanwhile))
    batch = service.add(rows(3))
    assert service.wait(batch).status == "completed" and seen
    work = service.catalog.work(batch)
    assert gone(work / "commits") and gone(work / "salvage") and [path.name for path in work.iterdir()] == ["notes.txt"]


def test_repeated_ids_are_found_across_parts_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("batchinfer.io.seen_ids._BUFFERED_IDS", 100)
    data = tmp_path / "in.jsonl"
    data.write_bytes(rows(3000) + content([line(7), line(2999), line(3000)]))
    spool = Spool(tmp_path)
    found = check_lines(data, CHAT, {"fake"}, spool, lambda: False)
    assert [(p.code, p.line, "line 8 " in p.message) for p in found.problems] == [
        ("duplicate_custom_id", 3001, True),
        ("duplicate_custom_id", 3002, False),
    ]
    assert found.rows == 3003 and [path.name for path in spool.path.iterdir()] == ["lock"]
    assert check_lines(data, CHAT, {"fake"}, spool, lambda: True) is None
    spool.close()
