"""The audit's reading of records and summaries: side by side, bounded, and with each disagreement named."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from batchinfer.io.storage import LocalStore, Store
from batchinfer.job.inspect.verify import audit
from batchinfer.job.ledger import CommitKey, Ledger
from batchinfer.job.plan import load_plan
from batchinfer.job.retry import retry_job
from batchinfer.job.summaries import Entry, Stretch, decode, encode, md5
from batchinfer.job.summary_writer import write
from tests.job.outputs import STORAGE, change_json, commit_files, make_output, make_spec

CHUNKS = 30


def fold(out: Path, number: int = 0) -> Path:
    """Write the summary of a pass's records, as on a store that marks objects."""
    store = LocalStore(str(out), out)
    ledger = Ledger(store, load_plan(store))
    keys = [key for key in ledger.listing().records if key.pass_number == number]
    lines = {key.chunk: (out / key.name).read_bytes() for key in keys}
    stretch = Stretch(0, 1, CHUNKS, number)
    write(ledger, stretch, {chunk: Entry(line, md5(line)) for chunk, line in lines.items()})
    return out / stretch.name(ledger.plan)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Of one row a chunk."""
    folder = tmp_path_factory.mktemp("finished")
    out = make_output(folder, output={"chunk_rows": 1, "format": "jsonl"})
    fold(out)
    return out


@pytest.fixture
def out(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def problems(out: Path) -> list[str]:
    return [str(difference) for difference in audit(str(out), STORAGE).differences]


def summary(out: Path) -> Path:
    [path] = (out / "summaries").iterdir()
    return path


def test_summaries_that_agree_are_no_difference(out):
    assert problems(out) == []


def test_a_summary_that_does_not_agree_is_named(out):
    path, digest = summary(out), load_plan(LocalStore(str(out), out)).digest
    good = path.read_bytes()
    entries = decode(good, digest)
    lied = [Entry(line.replace(b'"ok": 1', b'"ok": 0'), mark) for line, mark in entries]
    gone = [*entries, Entry(entries[0].line.replace(b'"chunk": 0', b'"chunk": 77'), "x")]
    for data, words in (
        (encode(digest, lied[:2]), "does not agree with commits/000000.json, commits/000001.json:"),
        (encode(digest, lied), "commits/000002.json and others:"),
        (encode(digest, gone), "does not agree with commits/000077.json:"),
        (encode("another", entries), "belongs to another job"),
        (encode(digest, [Entry(b"[1]\n", "x")]), "damaged: not an object"),
        (encode(digest, [Entry(b'{"chunk": "0"}\n', "x")]), "damaged: a line is not a commit record"),
        (good[: len(good) // 2], "damaged"),
        (b"", "damaged"),
    ):
        path.write_bytes(data)
        [found] = problems(out)
        assert path.name in found and words in found and "may be removed" in found


def test_a_record_that_changed_after_it_was_folded_is_named_with_its_summary(out):
    change_json(commit_files(out)[4], prompt_tokens=5)
    found = problems(out)
    assert any("summaries/" in line and "commits/000004.json" in line for line in found)


def test_what_is_no_summary_of_the_job_is_named(out):
    shutil.copy(summary(out), out / "summaries/000000-1-30-00000000.jsonl.zst")
    (out / "summaries/notes.txt").write_text("mine")
    assert problems(out) == [
        "summaries/000000-1-30-00000000.jsonl.zst: is not a summary of this job",
        "summaries/notes.txt: is not a summary of this job",
    ]


def test_superseded_records_are_read_for_the_summaries_that_hold_them(tmp_path):
    """Records of the first pass stay when a retry replaces them; their summaries must still hold their bytes."""
    template = {"template": "{{ text }}"}
    sections = {"output": {"chunk_rows": 1, "format": "jsonl"}, "prompt": template}
    out = make_output(tmp_path, **sections)
    for path in commit_files(out):  # as if the engine had failed on each
        values = json.loads(path.read_bytes())
        part = out / values["part"]
        row = json.loads(part.read_bytes()) | {
            "status": "error",
            "error_type": "engine",
            "error": "x",
            "response": None,
        }
        part.write_text(json.dumps(row) + "\n")
        change_json(path, ok=0, errors={"engine": 1}, **_sizes(part.read_bytes()))
        path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True) + "\n")
    path = fold(out)
    retry_job(make_spec(tmp_path, **sections))
    fold(out, 1)
    assert len(commit_files(out)) == 2 * CHUNKS and problems(out) == []
    old = out / CommitKey(3, 0).name
    old.write_bytes(old.read_bytes().replace(b'"rows": 1', b'"rows": 2'))
    [found] = problems(out)
    assert path.name in found and "commits/000003.json" in found


def _sizes(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    "values", [{"rows": "1"}, {"errors": [1]}, {"errors": {"engine": None}}, {"part": ["x"]}, {"bytes": True}]
)
def test_a_record_of_other_types_is_a_difference_and_no_traceback(out, values):
    summary(out).unlink()
    change_json(commit_files(out)[2], **values)
    assert any("commits/000002.json: damaged" in line for line in problems(out))


@pytest.mark.parametrize("values", [{"pass": "1"}, {"parts": 7}, {"parts": [{"chunk": []}]}])
def test_a_manifest_of_other_types_is_a_difference_and_no_traceback(out, values):
    change_json(out / "manifest.json", **values)
    assert any("manifest.json" in line for line in problems(out))


def test_records_and_parts_are_read_side_by_side(out, monkeypatch):
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    lock = threading.Lock()

    class Slow(LocalStore):
        def read(self, name):
            kind = name.partition("/")[0]
            with lock:
                running[kind] += 1
                most[kind] = max(most[kind], running[kind])
            time.sleep(0.005)
            with lock:
                running[kind] -= 1
            return super().read(name)

    monkeypatch.setattr(Store, "open", classmethod(lambda cls, url, options: Slow(url, Path(url))))
    assert problems(out) == []
    assert 4 <= most["parts"] <= 16 and 4 <= most["commits"] <= 64
