"""Tests of duplicate ids, and of their errors in a job's input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, SpoolError
from batchinfer.io import seen_ids
from batchinfer.io.rows import RowSpan, scan_inputs, stream_rows
from batchinfer.io.seen_ids import SeenIds
from batchinfer.spec import InputSpec, StorageSpec
from tests.io.reading import write_lines


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 2)), max_size=60), st.sampled_from([7, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_every_repeated_id_is_found(ids, at_once):
    before, seen_ids._BUFFERED_IDS = seen_ids._BUFFERED_IDS, at_once
    try:
        with closing(SeenIds()) as seen:
            for line, (identity, file) in enumerate(ids, 1):
                seen.add(file, [identity], [line])
            found = dict(seen.repeated())
    finally:
        seen_ids._BUFFERED_IDS = before
    assert seen._ours is None or not seen._ours.exists()
    same_file = {again.line: first.line for again, first in found.items() if again.file == first.file}
    lines = list(enumerate(ids, 1))
    firsts = {line: next(n for n, other in lines if other == one) for line, one in lines}
    assert same_file == {line: first for line, first in firsts.items() if first != line}
    kinds = {identity for identity, _ in ids}
    assert len(found) == len(ids) - len(kinds)


def test_concurrent_adds_lose_no_id(tmp_path, monkeypatch):
    monkeypatch.setattr(seen_ids, "_BUFFERED_IDS", 100)
    with closing(SeenIds(tmp_path / "ids")) as seen:
        with ThreadPoolExecutor(8) as pool:
            for file in range(8):
                pool.submit(lambda file=file: seen.add(file, [f"{file}-{n % 400}" for n in range(500)], range(500)))
        assert sum(1 for _ in seen.repeated()) == 8 * 100
    assert not (tmp_path / "ids").exists()


def test_full_disk_is_a_spool_error(tmp_path, monkeypatch):
    monkeypatch.setattr(seen_ids, "_BUFFERED_IDS", 1)
    (tmp_path / "file").touch()
    with closing(SeenIds(tmp_path / "file" / "ids")) as seen, pytest.raises(SpoolError, match="ids"):
        seen.add(0, ["a"], [1])


def requests(*ids):
    return [{"custom_id": identity, "url": "/v1/completions", "body": {}} for identity in ids]


def read(tmp_path, pattern, **fields):
    inputs = scan_inputs(InputSpec(path=str(tmp_path / pattern), format="openai-batch", **fields), StorageSpec())
    spans = [RowSpan(number, 0, file.rows) for number, file in enumerate(inputs.files)]
    return {
        (span.file, offset): str(error)
        for span, batch in stream_rows(inputs, spans, StorageSpec())
        for offset, error in batch.errors.items()
    }


def test_ids_must_be_unique_only_within_a_file(tmp_path, capfd):
    write_lines(tmp_path / "a.jsonl", [b"", *requests("x", "y", "x", "x")])
    write_lines(tmp_path / "b.jsonl", requests("y", "z", "y"))
    errors = read(tmp_path, "?.jsonl")
    assert {place: error.rpartition(": ")[2] for place, error in errors.items()} == {
        (0, 2): "custom_id 'x' is already used on line 2",
        (0, 3): "custom_id 'x' is already used on line 2",
        (1, 2): "custom_id 'y' is already used on line 1",
    }
    told = json.loads(capfd.readouterr().err)
    assert told["lines"] == 1 and told["example"].endswith("a.jsonl:3 and " + str(tmp_path / "b.jsonl:1"))
    assert read(tmp_path, "a.jsonl", limit=2) == {}


def test_too_many_repeated_ids_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(seen_ids, "MAX_REPEATED", 5)
    write_lines(tmp_path / "a.jsonl", requests(*"x" * 6))
    assert len(read(tmp_path, "a.jsonl")) == 5
    write_lines(tmp_path / "a.jsonl", requests(*"x" * 7))
    with pytest.raises(InputError, match=r"more than 5 lines repeat a custom_id \(line 7 repeats line 1\)"):
        read(tmp_path, "a.jsonl")


def test_repeated_id_in_an_array_names_the_element(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(requests("x", "y", "x")))
    [(place, error)] = read(tmp_path, "a.json").items()
    assert place == (0, 2) and error.endswith("custom_id 'x' is already used by element [0]")
