"""The audit agrees with a good output, and finds every kind of damage in a bad one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import InputMissing
from batchinfer.job.inspect.verify import audit, describe_audit
from tests.job.outputs import (
    CHUNK_ROWS,
    ROWS,
    STORAGE,
    change_json,
    commit_files,
    make_output,
    part_of,
    rewrite,
    write_input,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_output(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """Return a copy to damage; the input stays where the plan says it is."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def problems(out: Path) -> list[str]:
    return [str(difference) for difference in audit(str(out), STORAGE).differences]


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def test_a_good_output_has_no_difference(out):
    found = audit(str(out), STORAGE)
    assert found.differences == []
    assert (found.chunks, found.parts, found.rows) == (3, 3, ROWS)
    assert found.bytes == sum(part.stat().st_size for part in (out / "parts").iterdir())
    assert "no difference" in describe_audit(found)


@pytest.mark.parametrize(
    "sections",
    [
        {"output": {"format": "jsonl"}},
        {"output": {"format": "jsonl", "compression": "zstd", "prefix": "model_"}},
        {"output": {"format": "jsonl", "compression": "gzip"}},
        {"output": {"prefix": "model_", "token_ids": True}},
        {"output": {"samples": "rows"}, "sampling": {"n": 3}},
        {"sampling": {"n": 3, "logprobs": 2}},
        {"input": {"where": "score > 1 and score < 3"}},
        {"input": {"where": "score > 100"}},
        {"input": {"limit": 13}},
        {"input": {"where": "score > 1", "limit": 13}},
        {"input": {"columns": ["id"]}},
        {"prompt": {"template": "{{ text[:5] if score < 1 else text.missing.attribute }}"}},
    ],
    ids=str,
)
def test_a_good_output_of_every_shape_has_no_difference(sections, tmp_path):
    assert problems(make_output(tmp_path, **sections)) == []


def test_openai_batch_output_is_compared(tmp_path):
    url = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": f"c{n}", **url, "body": {"prompt": f"say {n}", "max_tokens": 4}} for n in range(12)]
    lines[5]["body"]["prompt"] = ""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}
    out = make_output(tmp_path, input=source, prompt=None)
    assert problems(out) == []
    part = part_of(out, 0)
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(kept[:3] + kept[4:]))
    assert any(f"has no output for rows 3 of {tmp_path}" in problem for problem in problems(out))


def test_several_files_name_the_file_and_its_own_row(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_input(tmp_path, name, rows=15)
    out = make_output(tmp_path, input={"path": str(tmp_path / "?.parquet")})
    assert problems(out) == []
    table = pq.read_table(part_of(out, 3))
    rewrite(out, 3, table.slice(0, 2))  # rows 10 and 11 of b.parquet
    found = problems(out)
    assert any(f"has no output for rows 12-14 of {tmp_path / 'b.parquet'}" in problem for problem in found)


# -- damage to rows, with size and hash made to fit ----------------------------------------------------------------


def test_a_removed_row_is_named(out):
    table = pq.read_table(part_of(out, 1))
    rewrite(out, 1, pa.concat_tables([table.slice(0, 4), table.slice(5)]))
    found = problems(out)
    assert any("has no output for rows 14 of" in problem for problem in found)
    assert any("rows is 9, and commits/000001.json says 10" in problem for problem in found)
    assert audit(str(out), STORAGE).rows == ROWS - 1


def test_a_doubled_row_is_named(out):
    table = pq.read_table(part_of(out, 1))
    rewrite(out, 1, pa.concat_tables([table, table.slice(2, 1)]))
    assert any("has more than one output for rows 12 of" in problem for problem in problems(out))


def test_a_row_of_another_chunk_is_named(out):
    rewrite(out, 1, pa.concat_tables([pq.read_table(part_of(out, 1)), pq.read_table(part_of(out, 2)).slice(0, 1)]))
    assert any("has rows 20 of" in problem for problem in problems(out))


def test_results_beside_the_wrong_input_are_named(out):
    table = pq.read_table(part_of(out, 0))
    swapped = table.column("row").combine_chunks().take(pa.array([1, 0, *range(2, CHUNK_ROWS)]))
    rewrite(out, 0, table.set_column(table.schema.get_field_index("row"), "row", swapped))
    found = problems(out)
    assert any("row 0: column 'id' is not what" in problem for problem in found)
    assert any("row 1: column 'score' is not what" in problem for problem in found)


@pytest.mark.parametrize("column", ["row", "status", "prompt_tokens"])
def test_a_removed_column_is_a_difference(out, column):
    rewrite(out, 0, pq.read_table(part_of(out, 0)).drop_columns([column]))
    found = [problem for problem in problems(out) if problem.startswith("parts/")]
    assert column in only(found)


def test_counts_that_do_not_add_up(out):
    change_json(commit_files(out)[2], completion_tokens=1)
    found = problems(out)
    assert any("commits/000002.json says 1" in problem for problem in found)
    assert any(problem.startswith("manifest.json: completion_tokens is") for problem in found)


def test_a_missing_sample_is_a_difference(tmp_path):
    out = make_output(tmp_path, output={"samples": "rows"}, sampling={"n": 3})
    table = pq.read_table(part_of(out, 0))
    assert (table.column("row")[1].as_py(), table.column("sample")[1].as_py()) == (0, 1)
    rewrite(out, 0, pa.concat_tables([table.slice(0, 1), table.slice(2)]))
    assert any("more than one output for rows 0 of" in problem for problem in problems(out))


# -- damage to files -----------------------------------------------------------------------------------------------


def test_an_altered_byte_is_a_difference(out):
    part = part_of(out, 1)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert any("was altered: its sha256" in problem for problem in problems(out))


def test_a_truncated_part_is_a_difference(out):
    part = part_of(out, 1)
    part.write_bytes(part.read_bytes()[:-20])
    found = problems(out)
    assert any("bytes, and commits/000001.json says" in problem for problem in found)
    assert any("damaged" in problem for problem in found)


def test_a_missing_part_is_a_difference(out):
    part_of(out, 1).unlink()
    assert "missing, and commits/000001.json names it" in only(problems(out))


def test_a_stray_part_is_a_difference(out):
    shutil.copy(part_of(out, 1), out / "parts" / "part-000001-0000000000000000.parquet")
    problem = only(problems(out))
    assert problem.startswith("parts/part-000001-0000000000000000.parquet") and "no commit record names it" in problem


def test_a_missing_commit_names_its_rows(out):
    commit_files(out)[1].unlink()
    found = problems(out)
    assert any("rows 10-19 have no output: chunks 1 are not committed" in problem for problem in found)
    assert any("no commit record names it" in problem for problem in found)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
@pytest.mark.parametrize("name", ["plan.json", "job.json", "manifest.json", "commits/000000.json"])
def test_damaged_json_is_a_difference(out, name, content):
    (out / name).write_bytes(content)
    assert any(problem.startswith(f"{name}: damaged") for problem in problems(out))


@pytest.mark.parametrize("name", ["job.json", "manifest.json", "_SUCCESS"])
def test_a_missing_document_is_a_difference(out, name):
    (out / name).unlink()
    assert any(problem.startswith(f"{name}: missing") for problem in problems(out))


def test_a_commit_of_another_job_is_a_difference(out):
    change_json(commit_files(out)[0], fingerprint="0" * 64)
    assert any("commits/000000.json: belongs to another" in problem for problem in problems(out))


def test_commit_record_that_should_not_be_there(out):
    shutil.copy(commit_files(out)[0], out / "commits" / "000077.json")
    assert any("commits/000077.json: is not a commit record of this job" in problem for problem in problems(out))


def test_an_altered_plan_is_a_difference(out):
    plan = json.loads((out / "plan.json").read_bytes())
    plan["fingerprint"]["seed"] = "1"
    (out / "plan.json").write_text(json.dumps(plan))
    assert any("its digest is not that of its fingerprint" in problem for problem in problems(out))


def test_manifest_and_success_must_agree_with_the_records(out):
    change_json(out / "manifest.json", rows=29)
    found = problems(out)
    assert any("manifest.json: rows is 29, and the commit records have 30" in problem for problem in found)
    assert any("_SUCCESS: is not the sha256 of manifest.json" in problem for problem in found)


def test_an_input_that_changed_is_a_difference(tmp_path):
    out = make_output(tmp_path)
    write_input(tmp_path, rows=ROWS + 1)
    problem = only(problems(out))
    assert problem.startswith("input:") and "changed" in problem


def test_an_input_that_is_gone_is_a_difference(tmp_path):
    out = make_output(tmp_path)
    (tmp_path / "in.parquet").unlink()
    assert only(problems(out)).startswith("input:")
    table = pq.read_table(part_of(out, 1))
    rewrite(out, 1, table.slice(0, 4))  # rows are still counted
    assert any("has no output for rows 14-19" in problem for problem in problems(out))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(InputMissing, match=r"plan\.json"):
        audit(str(tmp_path), STORAGE)


def test_retry_pass_that_was_not_ended(out):
    record = json.loads(commit_files(out)[0].read_bytes())
    (out / "commits" / "000000.r1.json").write_text(json.dumps({**record, "pass": 1}))
    assert "retry pass 1 is not finished" in only(problems(out))
