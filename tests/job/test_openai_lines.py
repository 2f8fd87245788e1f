"""Answers of openai-batch rows in tables: every answer has a place in every output format."""

from dataclasses import replace

import orjson
import pytest

from batchinfer.errors import EngineFailure
from batchinfer.job.inspect.verify import audit
from batchinfer.job.retry import retry_job
from batchinfer.job.row_prompts import parse_line
from batchinfer.llm import LLM
from batchinfer.spec import StorageSpec
from tests.job.doubles import job, rows_of_output, run

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "pick", "parameters": {"type": "object"}}}
TAKES_TOOLS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}tools{% endif %}"
# url, body, whether one row of the table has no place for the answer
ANSWERED = [
    (TEXT, {"prompt": "a"}, False),
    (TEXT, {"prompt": "a", "prompt_logprobs": 1, "logprobs": 1}, False),
    (CHAT, {"messages": USER}, False),
    (TEXT, {"prompt": ["a", "b"], "logprobs": 1}, True),
    (TEXT, {"prompt": "a", "echo": True, "logprobs": 1}, True),
    (TEXT, {"prompt": ["ab", "c"], "echo": True, "max_tokens": 0}, True),
    (TEXT, {"prompt": "a", "n": 2, "seed": 1}, True),
    (CHAT, {"messages": USER, "tools": [TOOL]}, True),
    ("/v1/embeddings", {"input": ["a", "bc"]}, True),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, True),
]


@pytest.fixture
def requests(tmp_path):
    """Return a job over requests of every kind; its sections may be changed."""
    lines = [{"custom_id": str(n), "method": "POST", "url": u, "body": b} for n, (u, b, _) in enumerate(ANSWERED)]
    lines.append({"custom_id": "bad", "method": "POST", "url": "/v1/rerank", "body": {"input": "a"}})
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    source = {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}

    def answered(folder, llm=None, again=False, **sections):
        output = {"path": str(tmp_path / folder), "chunk_rows": 20, **sections.pop("output")}
        spec = job(tmp_path, input={**source, **sections.pop("input", {})}, prompt=None, output=output, **sections)
        run(spec, llm or LLM("fake", chat_template=TAKES_TOOLS))
        if again:
            run(spec, LLM("fake", chat_template=TAKES_TOOLS), job=retry_job)
        assert audit(str(tmp_path / folder), StorageSpec()).differences == []
        return rows_of_output(tmp_path / folder)

    return answered


@pytest.mark.parametrize("form", ["parquet", "openai-batch"])
def test_a_body_is_parsed_once_and_not_again_for_its_part(requests, form, monkeypatch):
    parsed = []

    def counted(row, model):
        parsed.append(row["url"])
        return parse_line(row, model)

    monkeypatch.setattr("batchinfer.job.row_prompts.parse_line", counted)
    assert len(requests("out", output={"format": form})) == len(parsed) == len(ANSWERED) + 1


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("samples", ["list", "rows"])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_every_answer_has_a_place_in_a_table(requests, form, samples, n):
    """What columns do not hold is in response_body, as openai-batch output has it."""
    sampling = {"max_tokens": 8, "n": n}
    narrow = {"columns": ["custom_id"]}  # what is asked is not shown
    lines = requests("lines", output={"format": "openai-batch"}, sampling=sampling)
    table = requests("table", output={"format": form, "samples": samples}, sampling=sampling, input=narrow)
    assert "body" not in table[0]
    by_id = {row["custom_id"]: [r for r in table if r["custom_id"] == row["custom_id"]] for row in table}
    for line, (url, body, apart) in zip(lines, ANSWERED, strict=False):
        rows, expected = by_id[line["custom_id"]], line["response"]["body"]
        assert [row["status"] for row in rows] == ["ok"] * len(rows)
        choices = expected.get("choices", [])
        texts = [c["text"] if url == TEXT else c["message"]["content"] for c in choices]
        if body.get("echo"):
            asked = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
            texts = [text.removeprefix(asked[place * len(asked) // len(texts)]) for place, text in enumerate(texts)]
        if samples == "rows":
            assert [row["response"] for row in rows] == (texts or [None])
            assert [row["sample"] for row in rows] == list(range(len(texts) or 1))
            assert all(row["response_body"] is None for row in rows[1:])
        elif n > 1:
            assert rows[0]["response"] == (texts or None)
        else:
            assert rows[0]["response"] == (texts[0] if len(texts) == 1 else None)
        held = apart and ((samples == "list" and n == 1) or url != TEXT or bool(body.get("echo")))
        found = rows[0]["response_body"]
        assert (found is not None) == held, body
        assert found is None or (orjson.loads(found) if form == "parquet" else found) == expected
        assert sum(row["completion_tokens"] for row in rows) >= expected["usage"].get("completion_tokens", 0)
        assert rows[0]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        if "prompt_logprobs" in body:
            assert rows[0]["prompt_logprobs"] and rows[0]["logprobs"]
    (bad,) = by_id["bad"]
    assert "url '/v1/rerank' is not supported" in bad["error"] and bad["response_body"] is None


@pytest.mark.parametrize("samples", ["list", "rows"])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_retry_keeps_bodies(requests, form, samples):
    right = LLM("fake", chat_template=TAKES_TOOLS)

    class Flaky:
        model_facts = right.model_facts
        stats = right.stats

        def run_prompts(self, prompts):
            for completion in right.run_prompts(prompts):
                bad = completion.index == 2
                yield replace(completion, outputs=[], error=EngineFailure("once")) if bad else completion

    output = {"format": form, "samples": samples}
    kept = requests("kept", Flaky(), again=True, output=output)
    assert kept == requests("whole", output=output)


ODD = b"[NaN, -Infinity, 1e400, 12345678901234567890123]"


@pytest.mark.parametrize("form", ["openai-batch", "parquet", "jsonl"])
def test_numbers_that_json_lacks_in_what_nobody_reads_cost_no_row(tmp_path, form):
    """Requests and answers are made of one reading of the body: what is run can be answered."""
    tool = b'{"type":"function","name":"f","function":{"name":"f"},"parameters":{"x":%s},"extra":%s}' % (ODD, ODD)
    bodies = [
        (b"/v1/chat/completions", b'"messages":[{"role":"user","content":"hi","z":%s}],"extra":%s' % (ODD, ODD)),
        (b"/v1/completions", b'"prompt":["a","b"],"echo":true,"extra":%s' % ODD),
        (b"/v1/responses", b'"input":"hi","extra":%s,"tools":[%s]' % (ODD, tool)),
        (b"/v1/embeddings", b'"input":"a","extra":%s' % ODD),
    ]
    line = b'{"custom_id":"%d","method":"POST","url":"%s","body":{%s}}\n'
    (tmp_path / "in.jsonl").write_bytes(b"".join(line % (n, url, body) for n, (url, body) in enumerate(bodies)))
    source = {"path": str(tmp_path / "in.jsonl"), "format": "openai-batch"}
    output = {"path": str(tmp_path / "out"), "format": form}
    run(job(tmp_path, input=source, prompt=None, output=output), LLM("fake", chat_template=TAKES_TOOLS))
    rows = rows_of_output(tmp_path / "out")
    assert [row["error"] for row in rows] == [None] * len(bodies)
