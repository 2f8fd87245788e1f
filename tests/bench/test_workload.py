"""Workloads: lengths, shared prefixes, files with their mistakes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from batchinfer.bench.latency import parse_batches
from batchinfer.bench.workload import Synthetic, TokenSpan, WorkloadFile, parse_span
from batchinfer.errors import InputError, InputMissing, UsageError
from batchinfer.pipeline.prepare import ModelLimits

LLM = SimpleNamespace(limits=ModelLimits(context=64, vocab_size=96, eos_ids=frozenset({2})))


@pytest.mark.parametrize(("text", "span"), [("5", (5, 5)), (" 1-9 ", (1, 9)), ("7-7", (7, 7))])
def test_span_is_parsed(text, span):
    assert parse_span("--input-tokens", text) == span


@pytest.mark.parametrize("text", ["", "0", "0-4", "9-3", "-3", "3-", "1-2-3", "1.5", "many", "٣", "9999999999"])
def test_invalid_span_is_refused(text):
    with pytest.raises(UsageError, match="--input-tokens"):
        parse_span("--input-tokens", text)


def test_span_is_printed_as_written():
    assert (str(TokenSpan(3, 3)), str(TokenSpan(3, 9))) == ("3", "3-9")


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,x", "-1", "²"])
def test_invalid_batch_list_is_refused(text):
    with pytest.raises(UsageError, match="--batch"):
        parse_batches(text)
    assert parse_batches("8, 1") == [8, 1]


def test_synthetic_lengths_and_prefix():
    shape = Synthetic(200, TokenSpan(6, 12), TokenSpan(2, 5), shared_prefix=4, seed=3)
    prompts = shape.prompts(LLM)
    assert len(prompts) == 200
    assert {len(prompt.contents[0]) for prompt in prompts} == set(range(6, 13))
    assert {prompt.params.max_tokens for prompt in prompts} == {2, 3, 4, 5}
    assert len({tuple(prompt.contents[0][:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt.contents[0]) for prompt in prompts}) > 190
    assert all(prompt.params.greedy and prompt.params.ignore_eos for prompt in prompts)
    assert prompts == shape.prompts(LLM) != Synthetic(200, TokenSpan(6, 12), TokenSpan(2, 5), 4, seed=4).prompts(LLM)
    assert "6-12 in, the first 4 of them shared, 2-5 out" in shape.describe()


def test_invalid_synthetic_workload_is_refused():
    with pytest.raises(UsageError, match="--shared-prefix 6"):
        Synthetic(1, TokenSpan(6, 12), TokenSpan(1, 1), shared_prefix=6)
    with pytest.raises(UsageError, match="65 tokens, and the context has 64"):
        Synthetic(1, TokenSpan(6, 60), TokenSpan(1, 5)).prompts(LLM)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_workload_file_is_read(tmp_path):
    path = write(tmp_path / "w.jsonl", {"id": "a", "ids": [1, 95], "max_tokens": 62}, "", {"ids": [3], "max_tokens": 1})
    workload = WorkloadFile.read(path, None)
    assert [line.number for line in workload.lines] == [1, 3]
    prompts = workload.prompts(LLM)
    assert [(prompt.contents[0], prompt.params.max_tokens) for prompt in prompts] == [([1, 95], 62), ([3], 1)]
    assert len(WorkloadFile.read(path, 1).lines) == 1
    assert workload.describe() == f"{path}: 2 requests"


GOOD = {"ids": [1], "max_tokens": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ({"ids": [1], "max_tokens": 1, "max_token": 2}, "did you mean 'max_tokens'"),
        ({"max_tokens": 1}, "ids: must be a list"),
        ({"ids": [], "max_tokens": 1}, "ids: must be a list"),
        ({"ids": [1, -1], "max_tokens": 1}, "ids: must be a list"),
        ({"ids": [1, True], "max_tokens": 1}, "ids: must be a list"),
        ({"ids": [1]}, "max_tokens: must be"),
        ({"ids": [1], "max_tokens": 0}, "max_tokens: must be"),
        ({"ids": [1], "max_tokens": "4"}, "max_tokens: must be"),
        ({"ids": [5, 96], "max_tokens": 1}, "token 96 is not in the model's vocabulary of 96"),
        ({"ids": [1] * 60, "max_tokens": 5}, "60 ids and max_tokens 5 are 65 tokens"),
    ],
)
def test_invalid_line_is_refused_with_its_number(tmp_path, line, message):
    path = write(tmp_path / "w.jsonl", GOOD, line)
    with pytest.raises(InputError) as caught:
        WorkloadFile.read(path, None).prompts(LLM)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_missing_or_empty_file_is_refused(tmp_path):
    for path in (tmp_path / "nothing.jsonl", tmp_path, write(tmp_path / "empty.jsonl", "", " ")):
        with pytest.raises(InputMissing, match=str(path)):
            WorkloadFile.read(path, None)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        WorkloadFile.read(tmp_path / "bytes.jsonl", None)
