"""The spool and the salvage journal on local disk: order, full disks, dead owners."""

import errno
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pyarrow as pa
import pytest

from batchinfer.errors import SpoolError
from batchinfer.job.results import RowResult, RowSample, encode_result
from batchinfer.job.salvage import Salvage
from batchinfer.job.shard import Shard
from batchinfer.job.spool import Spool
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run, write_parquet

PLAN = NamedTuple("Plan", [("digest", str), ("mark", str)])("abcdef", "abcdef")
CARRIED = pa.table({"id": [1, 2, 3]})


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path)
    yield spool
    spool.close()


def test_rows_come_back_in_order_of_arrival_and_chunks_complete(spool):
    assert spool.open(4, 3, [b"[0]"], CARRIED) == 2
    assert spool.add(4, b"[2]") is False
    assert spool.lines(4) == b"[0]\n[2]\n"
    assert spool.add(4, b"[1]") is True
    assert spool.lines(4) == b"[0]\n[2]\n[1]\n"
    assert spool.carried(4).equals(CARRIED)
    spool.drop(4)
    assert [path.name for path in spool.path.iterdir()] == ["lock"]


def test_large_rows_go_to_disk_at_once(spool):
    spool.open(0, 3, [], CARRIED)
    spool.add(0, b"x" * 100_000)
    assert sum(path.stat().st_size for path in spool.path.glob("*.rows")) == 100_001


def test_spools_of_dead_processes_are_removed_and_living_ones_kept(tmp_path):
    code = "import os, sys, pathlib; from batchinfer.job.spool import Spool\n"
    code += "spool = Spool(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    [dead] = tmp_path.iterdir()
    living = Spool(tmp_path)
    other = Spool(tmp_path)
    assert not dead.exists() and living.path.exists() and other.path.exists()
    living.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_only_a_spool_and_its_own_files_are_removed(tmp_path):
    """Folders that are called nearly so, that nobody has locked, and what somebody put into a dead one."""
    spool = Spool(tmp_path)
    names = ["batchinfer-spool-backup01", "batchinfer-spool-x", f"{spool.path.name}-old", f"old-{spool.path.name}"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_bytes(b"")
        (tmp_path / name / "000001.rows").write_bytes(b"theirs")
    (tmp_path / names[1] / "lock").write_bytes((spool.path / "lock").read_bytes())
    spool.open(0, 3, [], CARRIED)
    (spool.path / "notes.txt").write_bytes(b"theirs")
    (spool.path / "000001").mkdir()
    spool.close()
    Spool(tmp_path).close()
    assert sorted(path.name for path in spool.path.iterdir()) == ["000001", "lock", "notes.txt"]
    assert all((tmp_path / name / "000001.rows").read_bytes() == b"theirs" for name in names)


def test_a_full_disk_says_where_and_what_to_do(spool, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    spool.open(0, 3, [], CARRIED)
    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(SpoolError, match=r"batchinfer-spool-.*No space left.*--spool-dir") as caught:
        spool.add(0, b"x" * 100_000)
    assert caught.value.exit_code == 75


def test_a_full_disk_in_a_job_and_the_run_after_it(tmp_path, monkeypatch):
    write_parquet(tmp_path / "in.parquet", 20)
    spools = tmp_path / "spool"
    opened = pathlib.Path.open

    def full(path, mode="r", *rest):
        if path.name == "000002.rows" and mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *rest)

    with monkeypatch.context() as patch, pytest.raises(SpoolError, match="No space left"):
        patch.setattr("pathlib.Path.open", full)
        run(job(tmp_path), ScriptedLLM(), spool_dir=spools)
    assert run(job(tmp_path), ScriptedLLM(), spool_dir=spools).complete
    assert list(spools.iterdir()) == []


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="--spool-dir"):
        Spool(tmp_path / "file")


def rows_of(salvage, chunk):
    return [row.offset for row in salvage.results_of(chunk)]


def test_salvage_brings_rows_back_and_keeps_those_not_yet_opened(tmp_path):
    store = MemoryStore()
    lines = [encode_result(RowResult(offset, 3, [RowSample("x", "stop", 1)])) for offset in (0, 4)]
    first = Spool(tmp_path)
    for chunk in (1, 2, 5):
        first.open(chunk, 9, lines[:1], CARRIED)
        first.add(chunk, lines[1])
    Salvage(store, first, Shard(0, 2), PLAN, 0).save_journal()
    first.close()

    second = Spool(tmp_path)
    salvage = Salvage(store, second, Shard(0, 2), PLAN, 0)
    salvage.load_journals({1, 2})
    assert rows_of(salvage, 1) == [0, 4] and rows_of(salvage, 1) == [] and rows_of(salvage, 5) == []
    second.open(1, 9, lines[:1], CARRIED)
    salvage.save_journal()  # replaces the journal: chunk 2, not opened yet, must stay in it
    third = Salvage(store, second, Shard(1, 2), PLAN, 0)
    third.load_journals({1, 2})
    assert rows_of(third, 1) == [0] and rows_of(third, 2) == [0, 4]
    second.close()


@pytest.mark.parametrize(("plan", "number"), [(PLAN._replace(digest="abcdef2"), 0), (PLAN, 1)])
def test_a_journal_of_another_job_or_pass_is_ignored(tmp_path, plan, number, capsys):
    store, spool = MemoryStore(), Spool(tmp_path)
    spool.open(1, 9, [encode_result(RowResult(0, 3, [RowSample("x", "stop", 1)]))], CARRIED)
    Salvage(store, spool, Shard(), PLAN, 0).save_journal()
    foreign = Salvage(store, spool, Shard(), plan, number)
    foreign.load_journals({1})
    assert rows_of(foreign, 1) == []
    assert "belongs to another job" in capsys.readouterr().err
    spool.close()


def test_a_journal_without_the_mark_of_the_plan_is_not_read(tmp_path, capsys):
    store, spool = MemoryStore(), Spool(tmp_path)
    store.objects = {"salvage/0-of-1-00000000.jsonl.zst": b"theirs", "salvage/notes.txt": b"", "salvage/a/b": b""}
    Salvage(store, spool, Shard(), PLAN, 0).load_journals({1})
    assert capsys.readouterr().err == ""
    spool.close()
