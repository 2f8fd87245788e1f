"""Show: which rows are picked, and how they look."""

from __future__ import annotations

import json

import pytest

from batchinfer.errors import OutputConflict, UsageError
from batchinfer.job.inspect.show import Shown, describe_rows, pick
from batchinfer.job.ledger import open_output
from tests.job.outputs import STORAGE, make_output, part_of, write_input

FAILING = {"template": "{{ text.missing.attribute if id in ('r3', 'r15') else text }}"}


def picked(out, count: int = 5, **choice) -> list[Shown]:
    return pick(open_output(str(out), STORAGE), STORAGE, count, **choice)


def test_rows_are_spread_over_the_output(tmp_path):
    out = make_output(tmp_path)
    rows = [shown.row for shown in picked(out, 3)]
    assert rows == [0, 10, 20]
    assert [shown.row for shown in picked(out, 6)] == [0, 5, 10, 15, 20, 25]
    assert len(picked(out, 100)) == 30
    first = picked(out, 1)[0]
    assert first.input == {"id": "r0", "text": "question 0", "score": 0.0}
    assert first.output["status"] == "ok" and "id" not in first.output


def test_errors_shows_only_error_rows(tmp_path):
    out = make_output(tmp_path, prompt=FAILING)
    assert [shown.row for shown in picked(out, errors=True)] == [3, 15]
    assert [shown.row for shown in picked(out, 1, errors=True)] == [3]
    assert "missing" in describe_rows(picked(out, 1, errors=True), 100)


def test_an_output_without_errors_shows_none(tmp_path):
    assert picked(make_output(tmp_path), errors=True) == []


def test_a_row_is_found_by_its_position(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_input(tmp_path, name, rows=15)
    out = make_output(tmp_path, input={"path": str(tmp_path / "?.parquet")})
    shown = picked(out, row=12)
    assert [(one.file, one.row) for one in shown] == [(str(tmp_path / f"{name}.parquet"), 12) for name in "ab"]
    with pytest.raises(UsageError, match="a row 15"):
        picked(out, row=15)


def test_columns_that_are_not_carried_come_from_the_input(tmp_path):
    out = make_output(tmp_path, input={"columns": ["id"]}, output={"prefix": "model_"})
    assert picked(out, 1)[0].input["text"] == "question 0"
    assert set(picked(out, 1)[0].output) >= {"row", "response"}
    (tmp_path / "in.parquet").unlink()
    assert picked(out, 1)[0].input == {"id": "r0"}


def test_samples_and_json_lines_are_shown(tmp_path):
    out = make_output(tmp_path, output={"samples": "rows", "format": "jsonl"}, sampling={"n": 2})
    assert [one.output["sample"] for one in picked(out, row=4)] == [0, 1]


def test_openai_batch_lines_are_shown(tmp_path):
    url = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": f"c{n}", **url, "body": {"prompt": "say" if n else "", "max_tokens": 4}} for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}
    out = make_output(tmp_path, input=source, prompt=None)
    (failed,) = picked(out, errors=True)
    assert (failed.row, failed.input["custom_id"]) == (0, "c0")
    assert picked(out, row=2)[0].output["response"]["status_code"] == 200


def test_a_missing_part_is_an_error_that_names_it(tmp_path):
    out = make_output(tmp_path)
    part_of(out, 0).unlink()
    with pytest.raises(OutputConflict, match="batchinfer verify"):
        picked(out)


def test_blocks_are_stacked_or_side_by_side_by_width():
    shown = [Shown("in.parquet", 7, {"id": "x", "text": "word " * 40}, {"row": 7, "response": "answer", "error": None})]
    stacked, wide = describe_rows(shown, 80), describe_rows(shown, 160)
    assert max(map(len, stacked.splitlines())) <= 80 and max(map(len, wide.splitlines())) <= 160
    assert "row 7 of in.parquet" in stacked and "error" not in stacked
    assert "│ response  answer" in wide and len(wide.splitlines()) < len(stacked.splitlines())


def test_shown_text_is_printable_and_cut():
    values = {"bell": "a\x1b[31mred\x07", "long": "x" * 5000, "list": [1, 2], "empty": "", "lines": "one\n\ntwo"}
    text = describe_rows([Shown("f", 0, values, {"row": 0})], 100)
    assert "\x1b" not in text and "\\x1b[31mred\\x07" in text
    assert "(3,800 more characters)" in " ".join(text.split()) and "[1,2]" in text
    assert len(text) < 2500
