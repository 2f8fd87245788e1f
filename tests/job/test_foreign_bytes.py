"""What lies in the folder of an output or of an endpoint and is not ours is, after all that can happen, as it was.

Files of any name at any depth, links and empty folders come before a job begins, between its runs and while it runs;
the job is killed at any operation on its store, resumed and retried.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchinfer.batches.catalog import BatchRecord, Catalog, new_id
from batchinfer.batches.runner import BatchRunner
from batchinfer.errors import EngineFailure, OutputConflict, UserError
from batchinfer.io.storage import LocalStore
from batchinfer.job.retry import retry_job
from tests.job.doubles import ScriptedLLM, job, run, snapshot, write_parquet
from tests.server.batch_lines import CHAT, rows

LETTERS = st.text("abcAZ09-_. []*?#%~é\n", min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))
HEX, DEEP = "0123456789abcdef", "deep/er"
# names of ours, with the mark of the plan in place of MARK
OWN = [
    "parts/part-000001-MARK-0123456789abcdef.parquet",
    "salvage/0-of-1-MARK.jsonl.zst",
    ".tmp/batchinfer-0123456789abcdef0123456789abcdef",
    "commits/000001.json",
    "commits/000001.r1.json",
    "plan.json",
    "job.json",
    "manifest.json",
    "_SUCCESS",
    "report.json",
    "files/file-0123456789abcdef0123456789abcdef.content",
    "files/file-0123456789abcdef0123456789abcdef.json",
    "batches/batch_0123456789abcdef0123456789abcdef.json",
    ".tmp/upload-0123456789abcdef0123456789abcdef",
    "spool/batchinfer-spool-abcd0123/000001.rows",
]
MARKED = re.compile(
    r"parts/part-\d{6,}-MARK-[0-9a-f]{16}\.(parquet|jsonl(\.gz|\.zst)?)|salvage/\d+-of-\d+-MARK\.jsonl\.zst"
)
TEMPORARY = re.compile(r"(?:work/batch_[0-9a-f]{32}/)?\.tmp/(batchinfer|upload)-[0-9a-f]{32}")


@st.composite
def near(draw):
    """Return a name of ours with one thing changed, or in another place."""
    name = draw(st.sampled_from(OWN))
    folder, _, last = name.rpartition("/")
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return f"{folder or 'parts'}/{DEEP}/{last}"
    if kind == 1:
        return f"{draw(st.sampled_from(('parts', 'commits', 'salvage', '.tmp', 'x', 'work')))}/{last}"
    if kind == 2:
        return name + draw(st.sampled_from((".crc", "~", ".bak", "0", "\n", " ")))
    if kind == 3:
        return name.replace("MARK", draw(st.text(HEX, min_size=8, max_size=8)))
    if kind == 4:
        place = draw(st.integers(0, len(last) - 1))
        return f"{folder}/{last[:place]}{last[place + 1 :]}".lstrip("/")
    if kind == 5:
        return f"{folder}/{last.swapcase()}".lstrip("/")
    return f"{folder}/.{last}".lstrip("/")


OURS_FOLDERS = st.sampled_from(("", "parts/", "salvage/", "commits/", ".tmp/", "files/", "work/", "spool/"))
ANY = st.builds(lambda folder, names: folder + "/".join(names), OURS_FOLDERS, st.lists(LETTERS, min_size=1, max_size=3))
NAMES = st.one_of(near(), ANY, st.sampled_from(OWN))
KINDS = st.sampled_from(("file", "old", "folder", "link", "link to a folder", "link to nothing"))
FOREIGN = st.lists(st.tuples(NAMES, KINDS), max_size=3)


class Foreign:
    """What others put below a folder, and whether it is still so."""

    def __init__(self, folder: Path, outside: Path) -> None:
        self.folder = folder
        self.outside = outside
        self.put: dict[Path, object] = {}
        outside.mkdir()
        (outside / "file").write_bytes(b"outside")

    def add(self, wanted, mark: str) -> None:
        """Those names that are ours by the rule are left out, and those under which something lies already."""
        for name, kind in wanted:
            if ("MARK" in name and MARKED.fullmatch(name)) or TEMPORARY.fullmatch(name):
                continue
            path = self.folder / name.replace("MARK", mark)
            if any(parent in self.put and parent.is_symlink() for parent in path.parents):
                continue  # it would be outside
            with contextlib.suppress(OSError):  # a file where this wants a folder
                path.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(path):
                    self._make(path, kind)
                    self.put[path] = look(path)

    def _make(self, path: Path, kind: str) -> None:
        if kind == "folder":
            path.mkdir()
        elif kind.startswith("link"):
            places = {"link": self.outside / "file", "link to a folder": self.outside, "link to nothing": "nothing"}
            path.symlink_to(places[kind])
        else:
            path.write_bytes(b"theirs: " + path.name.encode())
            if kind == "old":
                os.utime(path, (1e9, 1e9))

    def check(self) -> None:
        assert {path: look(path) for path in self.put} == self.put
        assert look(self.outside / "file") == b"outside" and len(list(self.outside.iterdir())) == 1


def look(path: Path):
    if path.is_symlink():
        return path.readlink()
    return "folder" if path.is_dir() else path.read_bytes() if path.exists() else "gone"


class Killed(BaseException):
    pass


class Mortal(LocalStore):
    """Ends the process, as a kill would, at the k-th operation: before it or, of a file, with the file half there."""

    def __init__(self, root: Path, operations: int | None) -> None:
        super().__init__(str(root), root)
        self.left = operations

    def _count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def read(self, name):
        self._count()
        return super().read(name)

    def scan(self, prefix=""):
        self._count()
        return super().scan(prefix)

    def delete(self, names):
        for name in names:
            self._count()
            super().delete([name])

    @contextlib.contextmanager
    def _temporary(self, name):
        with super()._temporary(name) as temporary:
            try:
                self._count()
                yield temporary
            except Killed:
                left = temporary.with_name(f"batchinfer-{len(list(temporary.parent.iterdir())):032x}")
                left.write_bytes(b"half")
                os.utime(left, (1e9, 1e9))
                raise


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Make a folder with an input, and what the job writes where nothing else lies."""
    folder = tmp_path_factory.mktemp("whole")
    write_parquet(folder / "in.parquet", 6)
    run(job(folder, output={"chunk_rows": 2}), ScriptedLLM(answer))
    retried = run(job(folder, output={"chunk_rows": 2}), ScriptedLLM(), job=retry_job)
    assert retried.rows["run"] == 1
    mark = json.loads((folder / "out/plan.json").read_bytes())["digest"][:8]
    return lambda: (folder, mark, snapshot(folder / "out"))


def answer(prompt):
    return EngineFailure("passing") if prompt.index == 3 else None


def left_behind(out: Path, foreign: Foreign) -> list[Path]:
    """Journals and temporary files of ours."""
    found = [path for folder in ("salvage", ".tmp") for path in (out / folder).glob("*")]
    return [path for path in found if path.is_file() and path not in foreign.put]


@settings(max_examples=60, deadline=None)
@given(first=FOREIGN, later=FOREIGN, last=FOREIGN, kills=st.lists(st.integers(0, 50), max_size=2))
@example(first=[("parts/in.jsonl", "file")], later=[], last=[], kills=[])
@example(first=[(".tmp/old", "old"), ("README", "file")], later=[("parts/x/y", "file")], last=[], kills=[20])
@example(first=[], later=[("report.json", "file")], last=[("_SUCCESS", "file")], kills=[30])
@example(first=[], later=[], last=[("0", "link to a folder"), ("0/0", "file")], kills=[])
def test_an_output(whole, tmp_path_factory, first, later, last, kills):
    source, mark, expected = whole()
    folder = tmp_path_factory.mktemp("output")
    out = folder / "out"
    spec = job(source, output={"path": str(out), "chunk_rows": 2})
    foreign = Foreign(out, folder / "outside")
    foreign.add(first, mark)
    try:
        for kill in kills:
            with contextlib.suppress(Killed):
                run(spec, ScriptedLLM(answer), Mortal(out, kill))
            foreign.check()
            foreign.add(later, mark)
        run(spec, ScriptedLLM(answer), Mortal(out, None))
        foreign.check()
        foreign.add(last, mark)
        run(spec, ScriptedLLM(), Mortal(out, None), job=retry_job)
    except UserError as error:
        assert foreign.put and isinstance(error, OutputConflict)
        foreign.check()
        return
    foreign.check()
    theirs = {str(path.relative_to(out)) for path in foreign.put}
    assert {name: data for name, data in snapshot(out).items() if name not in theirs} == expected
    assert not left_behind(out, foreign)
    shutil.rmtree(folder)


@settings(max_examples=25, deadline=None)
@given(first=FOREIGN, later=FOREIGN, during=FOREIGN)
@example(first=[("files/notes.json", "file")], later=[], during=[])
@example(first=[(".tmp/x/y", "old")], later=[("files/notes.json", "file"), (".tmp/z", "folder")], during=[])
@example(first=[], later=[], during=[("work/BATCH/notes", "file"), ("work/BATCH/parts/part-000001.jsonl", "file")])
def test_an_endpoint(tmp_path_factory, first, later, during):
    folder = tmp_path_factory.mktemp("endpoint")
    root = folder / "data"
    foreign = Foreign(root, folder / "outside")
    foreign.add(first, "00000000")
    try:
        catalog = Catalog(root)
    except OutputConflict:
        foreign.check()
        return
    foreign.check()
    path = catalog.temporary()
    path.write_bytes(rows(3))
    file = catalog.add_file(path, "in.jsonl", "batch")
    batch = BatchRecord(new_id("batch_"), CHAT, file.id, "24h", 2**40, None)
    catalog.add_batch(batch)
    catalog.temporary().write_bytes(b"an upload that broke off")
    catalog.close()
    foreign.add(later, "00000000")
    with contextlib.suppress(OutputConflict):
        catalog = Catalog(root)
        foreign.check()
        inside = [(name if name.startswith("work/") else f"work/BATCH/{name}", kind) for name, kind in during]
        llm = ScriptedLLM(
            after=lambda _: foreign.add([(name.replace("BATCH", batch.id), kind) for name, kind in inside], "00000000")
        )
        runner = BatchRunner(catalog, llm, {"model": "fake"}, {"fake"})
        with contextlib.suppress(UserError):
            runner._check(batch.id)
            runner._run(batch.id)
        foreign.check()
        assert left_behind(root, foreign) == []
        catalog.delete_file(file.id)
        catalog.close()
    foreign.check()
    shutil.rmtree(folder)
