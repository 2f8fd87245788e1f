"""What lies in an output and is not its job's stays as it is: only names that carry the plan's mark are deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.errors import OutputConflict, StorageError
from batchinfer.job.inspect.preview import describe_preview, preview
from batchinfer.job.retry import retry_job
from batchinfer.job.shard import Shard
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run, snapshot, write_parquet


def mark_of(out: Path) -> str:
    return json.loads((out / "plan.json").read_bytes())["digest"][:8]


def test_names_near_to_our_own_survive_the_sweep(tmp_path, capsys):
    """They came while the job ran: those with the plan's mark, at their place, are what a killed worker left."""
    write_parquet(tmp_path / "in.parquet", 8)
    out = tmp_path / "out"

    def meanwhile(done):
        if done == 1:
            mark = mark_of(out)
            for name in ours(mark) + theirs(mark):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text(name)

    run(job(tmp_path), ScriptedLLM(after=meanwhile))
    mark = mark_of(out)
    assert not [name for name in ours(mark) if (out / name).exists()]
    assert {name: (out / name).read_text() for name in theirs(mark)} == {name: name for name in theirs(mark)}
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "did not write" in line]
    assert said[0]["objects"] == sum(name.startswith("parts/") and "/." not in name for name in theirs(mark))


def ours(mark):
    return [f"parts/part-000001-{mark}-{'0' * 16}.parquet", f"salvage/3-of-7-{mark}.jsonl.zst"]


def theirs(mark):
    part = f"part-000001-{mark}-{'0' * 16}.parquet"
    return [
        "parts/notes.txt",
        "parts/.hidden",
        f"parts/deep/{part}",
        f"parts/{part}.crc",
        f"parts/{part.replace(mark, '0' * 8)}",
        f"parts/{part.upper()}",
        f"parts/{part.replace('000001', '0000001')}",
        f"parts/{part.replace('000001', '1')}",
        f"parts/part-000001-{'0' * 16}.parquet",
        f"salvage/3-of-7-{'0' * 8}.jsonl.zst",
        f"salvage/deep/3-of-7-{mark}.jsonl.zst",
        "salvage/3-of-7.jsonl.zst",
        f"part-000001-{mark}-{'0' * 16}.parquet",
        "README.md",
    ]


# -- refused before anything is written -----------------------------------------------------------------------------


def tree(folder):
    """Everything below a folder: the bytes of files, where links point to, folders."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def place(tmp_path):
    write_parquet(tmp_path / "in.parquet", 8)
    return tmp_path


def refused(place, match, job_=None, **worker):
    before = tree(place)
    with pytest.raises(OutputConflict, match=match) as caught:
        run(job_ or job(place), ScriptedLLM(), **worker)
    assert caught.value.exit_code == 73
    assert tree(place) == before


OCCUPIED = [
    "parts/in.jsonl",
    "parts/day=1/in.jsonl",
    "salvage/0-of-1.jsonl.zst",
    "commits/000000.json",
    "job.json",
    "manifest.json",
    "_SUCCESS",
    "report.json",
]


@pytest.mark.parametrize("name", OCCUPIED)
def test_an_output_without_a_plan_in_which_something_has_our_place(place, name):
    (place / "out" / name).parent.mkdir(parents=True)
    (place / "out" / name).touch()
    refused(place, f"holds {name} where this job would write")
    found = preview(job(place), 5)
    assert found.conflict is not None and "holds what is not this job's" in describe_preview(found)


def test_what_lies_beside_is_nobodys_business(place):
    out = place / "out"
    theirs = (
        "README.md",
        "parts.txt",
        "parts/.crc",
        "data/parts/x",
        ".tmp/theirs",
        "report-0-of-2.json",
        "x/plan.json",
    )
    for name in theirs:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    (out / "commits").mkdir()
    run(job(place), ScriptedLLM())
    assert [(out / name).read_text() for name in theirs] == list(theirs)


@pytest.mark.parametrize("name", ["", "parts", "commits", "salvage", ".tmp"])
def test_a_file_where_a_folder_goes_is_refused(place, name):
    (place / "out").mkdir() if name else None
    (place / "out" / name).write_bytes(b"theirs")
    refused(place, "is not a folder")


@pytest.mark.parametrize("name", ["plan.json", "job.json", "manifest.json", "_SUCCESS", "report.json"])
def test_a_folder_where_a_file_goes_is_refused(place, name):
    (place / "out" / name).mkdir(parents=True)
    refused(place, "is not a file")


def test_links_in_our_places_are_refused(place):
    (place / "out/real").mkdir(parents=True)
    (place / "out/report.json").symlink_to("nothing")
    refused(place, "is not a file")
    (place / "out/report.json").unlink()
    (place / "out/.tmp").symlink_to("real")
    refused(place, "is not a folder")
    (place / "out/.tmp").unlink()
    (place / "out/parts").symlink_to("real")
    (place / "out/real/data").symlink_to(place)  # a folder of other data, as a part of this one
    refused(place, "holds parts/data where")


def test_a_plan_of_another_tool_or_version_is_refused(place):
    (place / "out").mkdir()
    (place / "out/plan.json").write_text('{"format": 1}')
    refused(place, "not a plan of batchinfer")
    (place / "out/plan.json").write_text("")
    refused(place, "empty, as a crash may leave it: move it away")
    (place / "out/plan.json").write_text('{"format": "2", "fingerprint": {}}')
    refused(place, "output format 2, this one writes 3")


@pytest.mark.parametrize("name", ["manifest.json", "_SUCCESS", "report.json"])
@pytest.mark.parametrize("again", ["resume", "run", "retry"])
def test_what_came_under_our_names_after_the_job_began(place, name, again):
    if again == "resume":
        with pytest.raises(StorageError):
            run(job(place), Dying())
    else:
        run(job(place), ScriptedLLM())
    (place / "out" / name).write_text('{"theirs": 1}')
    before = tree(place)
    with pytest.raises(OutputConflict, match=f"holds {name} where this job would write, and they are not of the job"):
        run(job(place), ScriptedLLM(), **({"job": retry_job} if again == "retry" else {}))
    assert tree(place) == before


class Dying(ScriptedLLM):
    def run_prompts(self, prompts):
        yield from super().run_prompts(prompt for prompt, _ in zip(prompts, range(6), strict=False))
        raise StorageError("dead")


@pytest.mark.parametrize("name", ["manifest.json", "_SUCCESS"])
def test_what_comes_under_our_names_while_the_job_runs(place, name):
    theirs = place / "out" / name
    with pytest.raises(OutputConflict, match=f"{name}: is not this job's"):
        run(job(place), ScriptedLLM(after=lambda _: theirs.write_bytes(b"theirs")))
    assert theirs.read_bytes() == b"theirs"
    theirs.unlink()
    run(job(place), ScriptedLLM())
    assert (place / "out/_SUCCESS").exists()


def test_a_report_that_comes_while_the_job_runs_is_not_written_over(place, capsys):
    theirs = place / "out/report.json"
    run(job(place), ScriptedLLM(after=lambda _: theirs.write_bytes(b"theirs")))
    assert theirs.read_bytes() == b"theirs" and (place / "out/_SUCCESS").exists()
    assert "the report is not written" in capsys.readouterr().err


def test_a_job_whose_workers_begin_at_once_is_no_conflict(place):
    """The second looks at the output between the first one's listing of it and its plan."""
    objects = {}

    class Slow(MemoryStore):
        def read(self, name):
            found = super().read(name)
            if name == "plan.json" and found is None:
                run(job(place), ScriptedLLM(), MemoryStore(objects), shard=Shard(0, 2, "test"))
            return found

    run(job(place), ScriptedLLM(), Slow(objects), shard=Shard(1, 2, "test"))
    assert "_SUCCESS" in objects


def test_a_document_that_was_cut_short_is_still_ours(place):
    run(job(place), ScriptedLLM())
    whole = snapshot(place / "out")
    report = place / "out/report.json"
    report.write_bytes(report.read_bytes()[:90])
    run(job(place), ScriptedLLM())
    assert json.loads(report.read_bytes())["outcome"] == "done" and snapshot(place / "out") == whole
    manifest = place / "out/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    with pytest.raises(OutputConflict, match=r"damaged .*; remove it and run the job again"):
        run(job(place), ScriptedLLM())
    manifest.unlink()
    run(job(place), ScriptedLLM())
    assert snapshot(place / "out") == whole
