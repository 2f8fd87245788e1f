"""Preview: what is counted and measured before a job runs, with nothing written."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.errors import InputMissing, SpecError
from batchinfer.job.inspect.preview import Preview, describe_preview, preview
from tests.job.outputs import make_output, make_spec, write_input


def texts(tmp_path, values: list[str | None]) -> None:
    pq.write_table(pa.table({"text": pa.array(values, pa.string())}), tmp_path / "in.parquet")


def preview_of(tmp_path, rows: int = 1000, **sections) -> Preview:
    return preview(make_spec(tmp_path, **sections), rows)


def test_a_preview_counts_and_writes_nothing(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_input(tmp_path, name, rows=15)
    found = preview_of(tmp_path, input={"path": str(tmp_path / "?.parquet")})
    assert (found.draft.plan.rows, len(found.draft.plan.chunks), found.exists) == (30, 4, False)
    assert (found.sample.rows, found.sample.selected) == (30, 30)
    assert not (tmp_path / "out").exists()
    text = describe_preview(found)
    assert "2 files, 30 rows" in text and "b.parquet  parquet, 15 rows" in text and "does not exist yet" in text


def test_a_preview_measures_prompts(tmp_path):
    texts(tmp_path, ["abcdef", "abcxyz", "abcdef", "q"])
    sample = preview_of(tmp_path).sample
    lengths = sample.lengths
    assert lengths[-1] - lengths[0] == 5  # a token of the byte tokenizer is a byte
    assert sample.repeated == 1
    special = lengths[0] - 1
    # the second "abcdef" shares all of itself, "abcxyz" the first three bytes, and what comes before the text
    assert sample.prefix_tokens == lengths[-1] + special + 3 + special


def test_the_sample_is_spread_and_bounded(tmp_path):
    write_input(tmp_path, rows=1000)
    found = preview_of(tmp_path, rows=50)
    assert found.sample.rows == 50
    assert preview_of(tmp_path, rows=3).sample.rows == 3


def test_rows_that_would_fail_are_counted_by_kind(tmp_path):
    texts(tmp_path, ["fine", None, "x" * 200, ""])
    found = preview_of(tmp_path, engine={"max_model_len": 64}, sampling={"max_tokens": 63})
    assert found.context_tokens == 64
    assert found.sample.errors == {"too_long": 1, "invalid_input": 2}
    assert found.sample.cut_short == 1  # "fine" leaves room for 60 tokens
    assert any("row 2: the prompt has" in example for example in found.sample.examples)
    assert "too_long 1" in describe_preview(found)


def test_rows_that_where_leaves_out_are_not_sampled(tmp_path):
    write_input(tmp_path)
    sample = preview_of(tmp_path, input={"where": "score < 1"}).sample
    assert (sample.rows, sample.selected, len(sample.lengths)) == (30, 7, 7)


def test_an_output_that_exists_is_told_apart(tmp_path):
    make_output(tmp_path)
    found = preview_of(tmp_path)
    assert (found.exists, found.committed, found.conflict) == (True, 3, None)
    assert found.conflict is None and "3 of 3 chunks committed" in describe_preview(found)
    other = preview_of(tmp_path, seed=9)
    assert other.conflict is not None and "seed: was 0, is 9" in str(other.conflict)
    assert "belongs to another job" in describe_preview(other)


def test_a_preview_of_openai_batch_reads_bodies(tmp_path):
    url = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": f"c{n}", **url, "body": {"prompt": "say", "max_tokens": 4}} for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}
    sample = preview_of(tmp_path, input=source, prompt=None).sample
    assert (len(sample.lengths), sample.repeated) == (3, 2)


def test_mistakes_are_raised_as_run_raises_them(tmp_path):
    with pytest.raises(InputMissing):
        preview_of(tmp_path)
    write_input(tmp_path)
    with pytest.raises(SpecError, match="txet"):
        preview_of(tmp_path, prompt={"template": "{{ txet }}"})
