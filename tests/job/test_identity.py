"""What makes an input the same one: its content, wherever it lies, whatever its name and times; and what does not."""

import gzip
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, OutputConflict
from batchinfer.io import source
from batchinfer.io.rows import scan_inputs
from batchinfer.io.source import SAMPLED, Sources
from batchinfer.job.inspect.verify import audit
from batchinfer.job.run import run_job
from batchinfer.job.shard import Shard
from batchinfer.spec import InputSpec, StorageSpec
from tests.job.doubles import MemoryStore, ScriptedLLM, job, run

ROWS = 20


@pytest.fixture(params=["parquet", "jsonl", "jsonl.gz"])
def path(request, tmp_path):
    path = tmp_path / f"in.{request.param}"
    write(path)
    return path


def write(path, rows=ROWS, text="row"):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [f"{text} {n}" for n in range(rows)]}), path, compression="none")
        return
    data = "".join(f'{{"text": "{text} {n}"}}\n' for n in range(rows)).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def touch(path):
    later = time.time_ns() + 5_000_000_000
    os.utime(path, ns=(later, later))


def of(tmp_path, path, **sections):
    return job(tmp_path, input={"path": str(path)}, **sections)


def interrupted(spec, store, rows=6):
    """Run a job that ends after some rows, some of them committed."""

    class Enough(Exception):
        pass

    def stop(done):
        if done > rows:
            raise Enough

    with pytest.raises(Enough):
        run(spec, ScriptedLLM(after=stop), store)


def copy(path, folder):
    folder.mkdir()
    shutil.copyfile(path, folder / path.name)
    return folder / path.name


def test_an_equal_file_resumes_whatever_became_of_it(tmp_path, path, monkeypatch):
    store = MemoryStore()
    interrupted(of(tmp_path, path), store)
    assert "_SUCCESS" not in store.objects
    touch(path)
    interrupted(of(tmp_path, path), store, rows=2)
    other = copy(path, tmp_path / "elsewhere")
    path.unlink()
    interrupted(of(tmp_path, other.as_uri()), store, rows=2)
    monkeypatch.chdir(other.parent)
    report = run(of(tmp_path, f"./{other.name}"), ScriptedLLM(), store)
    assert report.complete and "_SUCCESS" in store.objects
    assert len([name for name in store.objects if name.startswith("parts/")]) == 5


@pytest.mark.parametrize("text", ["Row", "longer"])
def test_another_content_is_refused(tmp_path, path, text):
    store = MemoryStore()
    interrupted(of(tmp_path, path), store)
    times = path.stat()
    size = times.st_size
    write(path, text=text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if path.suffix != ".gz" and text == "Row":
        assert path.stat().st_size == size
    with pytest.raises(OutputConflict, match=r"in\.\S+ changed since the output was begun \(\d+ bytes then, \d+ now.*"):
        run(of(tmp_path, path), ScriptedLLM(), store)


def test_what_became_of_the_files_is_named(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", text=name)
    store = MemoryStore()
    paths = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    interrupted(job(tmp_path, input={"path": paths[:2]}), store)
    for given_, said in (
        (paths, r"3 files; .*c\.jsonl is new"),
        (paths[:1], r"1 file; .*b\.jsonl is gone"),
        ([paths[1], paths[0]], "2 files; their order"),
        ([paths[0], paths[2]], r"c\.jsonl changed since .* too, with other content"),
    ):
        with pytest.raises(OutputConflict, match=said):
            run(job(tmp_path, input={"path": given_}), ScriptedLLM(), store)


def test_workers_of_an_array_may_have_copies_of_their_own(tmp_path, path):
    store = MemoryStore()
    copies = [copy(path, tmp_path / f"node{number}") for number in range(3)]
    for number, own in enumerate(copies):
        report = run(of(tmp_path, own), ScriptedLLM(), store, shard=Shard(number, 3))
    assert report.complete
    write(copies[0], text="other")
    with pytest.raises(OutputConflict, match="changed since"):
        run(of(tmp_path, copies[0]), ScriptedLLM(), store, shard=Shard(0, 3))


def test_a_touch_or_a_copy_during_the_run_is_no_change_and_a_change_is_one(tmp_path, path):
    def replaced(done):
        if done == 3:
            own = copy(path, tmp_path / "copy")
            own.replace(path)

    def changed(done):
        if done == 3:
            write(path, text="Row")

    run(of(tmp_path, path), ScriptedLLM(after=replaced), MemoryStore())
    with pytest.raises(InputError, match=rf"{path.name}: changed while it was read"):
        run(of(tmp_path, path), ScriptedLLM(after=changed), MemoryStore())


def test_verify_reads_an_equal_file(tmp_path, path):
    run_job(of(tmp_path, path, model="fake"))
    touch(path)
    assert audit(str(tmp_path / "out"), StorageSpec()).differences == []
    write(path, text="Row")
    assert any(
        "changed since the job was planned" in str(d) for d in audit(str(tmp_path / "out"), StorageSpec()).differences
    )


def test_verify_reads_the_input_where_the_job_file_has_it_now(tmp_path, path):
    out, plain = str(tmp_path / "out"), StorageSpec()
    run_job(of(tmp_path, path, model="fake"))
    moved = path.replace(tmp_path / f"moved.{path.name}")
    assert any("not found; given its job file" in str(d) for d in audit(out, plain).differences)
    spec = of(tmp_path, moved, model="fake")
    assert audit(out, plain, spec).differences == []
    write(moved, text="Row")
    assert any("not found" in str(d) for d in audit(out, plain, spec).differences)
    write(path)
    assert audit(out, plain, spec).differences == []  # the one that was read is there


def test_a_limit_reads_no_further_to_know_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_WHOLE_BYTES", 1 << 16)
    monkeypatch.setattr(source, "_SAMPLE_BYTES", 1 << 8)
    path = tmp_path / "in.jsonl"
    write(path, 20_000)
    limited = scan_inputs(InputSpec(path=(str(path),), limit=5), StorageSpec())
    assert limited.files[0].content.startswith(SAMPLED)
    assert scan_inputs(InputSpec(path=(str(path),)), StorageSpec()).files[0].content.startswith("sha256:")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_samples_cover_the_ends_and_the_footer(tmp_path_factory, data):
    """A large Parquet file: any byte of its ends or its footer, and its size, count."""
    path = Path(tmp_path_factory.mktemp("large")) / "a.parquet"
    table = pa.table({f"c{n}": range(300) for n in range(40)})
    pq.write_table(table, path, row_group_size=20)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_WHOLE_BYTES", 100)
        patch.setattr(source, "_SAMPLE_BYTES", 64)
        patch.setattr(source, "_SAMPLES", 4)
        with Sources(StorageSpec()).open(str(path)) as opened:
            before = opened.content()
            assert opened.content(before) == before and before.startswith(SAMPLED)
            place = data.draw(st.integers(0, 63) | st.integers(len(content) - footer, len(content) - 1))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert opened.content(before) != before
            path.write_bytes(content + b"x")
            assert opened.content(before) != before
