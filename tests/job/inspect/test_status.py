"""Status counts what is committed, while a job runs and after."""

from __future__ import annotations

import json

import pytest

from batchinfer.errors import InputMissing, OutputConflict
from batchinfer.job.inspect.status import Status, describe_status, read_status
from batchinfer.job.ledger import open_output
from batchinfer.job.run import run_job
from batchinfer.job.shard import Shard
from tests.job.outputs import STORAGE, commit_files, make_output, make_spec, write_input


def status_of(out, shards: int = 1) -> Status:
    return read_status(open_output(str(out), STORAGE), shards)


def test_status_of_a_finished_output_counts_everything(tmp_path):
    template = "{{ text.missing.attribute if row_id == 'r3' else text }}".replace("row_id", "id")
    status = status_of(make_output(tmp_path, prompt={"template": template}))
    assert (status.finished, status.chunks_done, status.chunks, status.rows, status.covered) == (True, 3, 3, 30, 30)
    assert (status.ok, status.errors, status.retry_passes, status.salvage) == (29, {"template": 1}, 0, {})
    assert status.completion_tokens > 29 and status.prompt_tokens > 29
    text = describe_status(status)
    assert "finished" in text and "1 rows (template 1)" in text


def test_rows_that_where_leaves_out_are_not_counted_as_written(tmp_path):
    status = status_of(make_output(tmp_path, input={"where": "score < 1"}))
    assert (status.rows, status.covered, status.finished) == (7, 30, True)


def test_status_has_the_share_of_each_shard(tmp_path):
    write_input(tmp_path, rows=50)
    spec = make_spec(tmp_path)
    run_job(spec, shard=Shard(1, 2))
    status = status_of(tmp_path / "out", shards=2)
    assert not status.finished and (status.chunks_done, status.chunks) == (2, 5)
    assert [(share.done, share.chunks) for share in status.shards] == [(0, 3), (2, 2)]
    assert "shard 1/2  2 of 2" in describe_status(status)


def test_salvage_is_mentioned_until_the_end(tmp_path):
    out = make_output(tmp_path)
    (out / "salvage").mkdir(exist_ok=True)
    mark = json.loads((out / "plan.json").read_bytes())["digest"][:8]
    (out / "salvage" / f"0-of-1-{mark}.jsonl.zst").write_bytes(b"12345")
    (out / "salvage" / "0-of-1-00000000.jsonl.zst").write_bytes(b"another job's")
    assert "journals" not in describe_status(status_of(out))
    (out / "_SUCCESS").unlink()
    assert "1 journals, 5 bytes" in describe_status(status_of(out))


def test_status_of_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(InputMissing, match="no job has written there"):
        status_of(tmp_path)


def test_a_damaged_record_is_an_error_that_names_it(tmp_path):
    out = make_output(tmp_path)
    commit_files(out)[0].write_bytes(b"{")
    with pytest.raises(OutputConflict, match=r"commits/000000\.json"):
        status_of(out)
