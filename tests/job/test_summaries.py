"""Summaries of commit records: few requests, and never another result than the records themselves give."""

import hashlib
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import AccessDenied, BatchInferError, EngineFailure
from batchinfer.job.inspect.status import read_status
from batchinfer.job.ledger import JobOutput, Ledger
from batchinfer.job.plan import load_plan
from batchinfer.job.prefetch import ahead
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from batchinfer.job.summaries import SUMMARIES, Entry, Stretch, cover, decode, encode, stretch_of
from tests.job.doubles import MarkingStore, MemoryStore, ScriptedLLM, job, run, write_parquet

CHUNKS = 300


def status_of(store):
    plan = load_plan(store)
    return read_status(JobOutput(store, plan, None, Ledger(store, plan)))


def finish(tmp_path, store=None, chunks=CHUNKS, llm=None, shards=1, **worker):
    """Run a job of one-row chunks on `store`, by one worker after the other."""
    if not (tmp_path / "in.parquet").exists():
        write_parquet(tmp_path / "in.parquet", chunks)
    spec = job(tmp_path, output={"chunk_rows": 1, "format": "jsonl"})
    store = MarkingStore() if store is None else store
    for index in range(shards):
        run(spec, llm or ScriptedLLM(), store, shard=Shard(index, shards), **worker)
    return spec, store


def without(objects, prefix=SUMMARIES):
    return {name: data for name, data in objects.items() if not name.startswith(prefix)}


def results(store):
    """Return what must not depend on summaries."""
    names = ("parts/", "commits/", "manifest.json", "_SUCCESS", "plan.json")
    return {name: data for name, data in store.objects.items() if name.startswith(names)}


def summaries(store):
    return [name for name in store.objects if name.startswith(SUMMARIES)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished"), chunks=40)


@pytest.mark.parametrize("mark", [None, lambda data: f"e{hashlib.sha1(data).hexdigest()}"], ids=["md5", "opaque"])
def test_status_and_resume_ask_for_few_objects(tmp_path, mark):
    """However the store marks objects. The last chunk is open again, as after a kill."""
    spec, store = finish(tmp_path, MarkingStore(**({"mark": mark} if mark else {})))
    whole = results(store)
    for name in ("commits/000299.json", "manifest.json", "_SUCCESS"):
        del store.objects[name]
    store.reads, store.scans = [], 0
    status = status_of(store)
    assert (status.chunks_done, status.rows, status.prompt_tokens) == (299, 299, 3 * 299)
    assert len(store.reads) + store.scans < 12, store.reads
    store.reads, store.scans = [], 0
    run(spec, ScriptedLLM(), store)
    assert len(store.reads) + store.scans < 25, store.reads
    assert results(store) == whole


def test_a_killed_worker_leaves_few_records_in_no_summary(tmp_path):
    class Dying(MarkingStore):
        def _create(self, name, data):
            if name.startswith("commits/") and len(self.objects) > 2 * 287:
                raise AccessDenied("killed")
            return super()._create(name, data)

    with pytest.raises(AccessDenied):
        finish(tmp_path, store := Dying())
    store.reads = []
    status = status_of(store)
    alone = [name for name in store.reads if name.startswith("commits/")]
    assert status.chunks_done > 250 and len(alone) < 16 + 4 and len(store.reads) < 16 + 25, "4 are in the window"


def test_workers_of_an_array(tmp_path):
    """Each folds its own chunks, and the last to end folds what they shared."""
    _, store = finish(tmp_path, shards=3)
    assert f"{SUMMARIES}000001-3-100-{load_plan(store).mark}.jsonl.zst" in store.objects
    store.reads = []
    assert status_of(store).rows == CHUNKS
    assert [name for name in store.reads if name.startswith(("commits/", SUMMARIES))] == [
        Stretch(0, 1, CHUNKS, 0).name(load_plan(store))
    ]


def test_a_retry_pass_has_summaries_of_its_own(tmp_path):
    failing = ScriptedLLM(lambda prompt: EngineFailure("x") if prompt.index % 3 else None)
    spec, store = finish(tmp_path, llm=failing)
    run(spec, ScriptedLLM(), store, retry_job)
    plain = MemoryStore(without(store.objects))
    store.reads = []
    status = status_of(store)
    assert status == status_of(plain) and (status.ok, status.retry_passes) == (CHUNKS, 1)
    assert sum(name.startswith("commits/") for name in store.reads) < 8 and len(store.reads) < 15
    assert {stretch_of(name, load_plan(store)).pass_number for name in summaries(store)} == {0, 1}


def test_two_workers_with_the_same_chunks(tmp_path):
    """Both commit and fold at once; one of each record holds, and the summaries are of those."""
    write_parquet(tmp_path / "in.parquet", 60)
    store = MarkingStore()
    answers = [ScriptedLLM(lambda prompt, who=who: f"{prompt.contents[0]} {who}") for who in "ab"]
    workers = [threading.Thread(target=finish, args=(tmp_path, store), kwargs={"llm": llm}) for llm in answers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert "_SUCCESS" in store.objects
    assert status_of(store) == status_of(MemoryStore(without(store.objects)))
    store.reads = []
    assert status_of(store).rows == 60
    assert not any(name.startswith("commits/") for name in store.reads)


def test_a_store_that_marks_nothing_has_no_summaries(tmp_path):
    _, store = finish(tmp_path, MemoryStore(), chunks=40)
    assert summaries(store) == []
    assert status_of(store).rows == 40


def test_a_summary_that_cannot_be_written_fails_nothing(tmp_path, capsys):
    class Refusing(MarkingStore):
        tries = 0

        def _create(self, name, data):
            if name.startswith(SUMMARIES):
                self.tries += 1
                raise AccessDenied("not there")
            return super()._create(name, data)

    _, store = finish(tmp_path, Refusing(), chunks=60)
    assert "_SUCCESS" in store.objects and store.tries == 2, "one of the worker, one at the end"
    assert "no more summaries are written" in capsys.readouterr().err


DAMAGE = ("keep", "delete", "cut", "flip", "foreign", "swap", "lie", "old")


def damaged(store, kind, name, other):
    """Return the bytes of a summary after some accident, None where it is gone."""
    data, digest = store.objects[name], load_plan(store).digest
    entries = decode(data, digest)
    lied = [Entry(line.replace(b'"ok": 1', b'"ok": 7'), mark) for line, mark in entries]
    return {
        "keep": lambda: data,
        "delete": lambda: None,
        "cut": lambda: data[: len(data) // 2],
        "flip": lambda: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "foreign": lambda: encode("another plan", entries),
        "swap": lambda: store.objects[other],
        "lie": lambda: encode(digest, [Entry(line, hashlib.md5(line).hexdigest()) for line, _ in lied]),
        "old": lambda: encode(digest, [Entry(line, "0" * 32) for line, _ in lied]),
    }[kind]()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_became_of_summaries_the_results_are_the_same(finished, data):
    """And of some records, which were removed or replaced after they were folded."""
    spec, good = finished
    names = summaries(good)
    objects = dict(good.objects)
    for name in names:
        kind = data.draw(st.sampled_from(DAMAGE))
        objects[name] = damaged(good, kind, name, data.draw(st.sampled_from(names)))
    records = sorted(name for name in objects if name.startswith("commits/"))
    for name in data.draw(st.lists(st.sampled_from(records), max_size=3)):
        line = good.objects[name]
        objects[name] = data.draw(st.sampled_from([None, line.replace(b'"ok": 1', b'"ok": 0'), b"{", line]))
    objects = {name: content for name, content in objects.items() if content is not None}
    for name in ("manifest.json", "_SUCCESS"):
        del objects[name]
    plain = MarkingStore(without(objects))
    assert outcome(spec, MarkingStore(objects)) == outcome(spec, plain)


def outcome(spec, store):
    """Status, then what a resume makes of it; or which error they end with."""
    try:
        before = status_of(store)
        run(spec, ScriptedLLM(), store)
        return before, status_of(store), results(store)
    except BatchInferError as error:
        return str(error)


def test_names_of_others_are_not_read(finished, tmp_path):
    _, good = finished
    plan = load_plan(good)
    name = Stretch(0, 1, 16, 0).name(plan)
    assert stretch_of(name, plan) == Stretch(0, 1, 16, 0)
    assert stretch_of(Stretch(3, 7, 5, 2).name(plan), plan) == Stretch(3, 7, 5, 2)
    for wrong in (
        name.replace(plan.mark, "0" * 8),
        name.replace("000000", "0000000"),
        name.replace("-1-16", "-0-16"),
        name.replace("-1-16", "-1-0"),
        name.replace("-1-16", "-01-16"),
        name.replace("-1-16", "-1-41"),
        name.replace("-1-16", f"-1-{'9' * 12}"),
        name.replace("-1-16", f"-1-{'9' * 5000}"),
        f"{name}.bak",
        f"{SUMMARIES}x/{name}",
    ):
        assert stretch_of(wrong, plan) is None, wrong


def test_the_largest_stretches_are_chosen_and_none_for_a_single_record():
    small, large, other = Stretch(0, 1, 4, 0), Stretch(0, 1, 8, 0), Stretch(1, 3, 4, 0)
    every = [(chunk, 0) for chunk in range(12)]
    assert cover([small, large, other], 12, every) == [large]
    assert cover([small, other], 12, every) == [small, other]
    assert cover([small, large, other], 12, every[9:]) == []
    assert cover([small, large], 12, [(chunk, 1) for chunk in range(12)]) == []


def test_a_costly_call_counts_as_several():
    """And one that costs more than all may is made alone."""
    open_ = set()
    for number in ahead(lambda number: open_.add(number) or number, range(1, 9), 4, cost=lambda number: number):
        assert sum(open_) <= 4 or open_ == {number}, open_
        open_.discard(number)
    assert not open_


def test_calls_run_side_by_side_bounded_and_in_order():
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(4, timeout=10)

    def call(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait()
        with lock:
            running -= 1
        if number == 11:
            raise KeyError(number)
        return number

    results_ = ahead(call, iter(range(12)), 4)
    assert [next(results_) for _ in range(11)] == list(range(11)) and most == 4
    with pytest.raises(KeyError):
        next(results_)


def test_the_manifest_is_plain_json(finished):
    """Its text is put together piece by piece, as json.dumps would write it."""
    data = finished[1].objects["manifest.json"]
    assert data == json.dumps(json.loads(data), indent=1).encode() + b"\n"
