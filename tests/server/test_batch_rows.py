"""Rows of a batch equal the endpoint's responses: the same bodies through both."""

from __future__ import annotations

import base64
import time
from array import array

import pytest

from batchinfer.batches.catalog import BatchRecord, Catalog, new_id
from batchinfer.batches.runner import BatchRunner
from batchinfer.llm import LLM
from batchinfer.server.shared_engine import SharedAnswerer
from tests.server.alike import alike
from tests.server.batch_lines import content, parsed
from tests.server.conftest import Endpoint, referring_tool

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES = "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
SHORT = {"max_tokens": 5, "temperature": 0}
LONG = {"max_tokens": 90, "temperature": 0}
PICK = referring_tool("pick")
NAMED = {"type": "function", "function": {"name": "pick"}}
FLAT = {"type": "function", "name": "pick", "parameters": PICK["function"]["parameters"]}
FORCED = {"tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False}

BODIES = {
    CHAT: [
        {"messages": HI, **SHORT},
        {"messages": HI, **SHORT, "model": "an-alias"},
        {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4, "temperature": 0, "n": 2, "seed": 5},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}]}], **SHORT, "unknown_field": 1},
        {"messages": HI, **SHORT, "logprobs": True, "top_logprobs": 3},
        {"messages": HI, **SHORT, "logprobs": True, "return_tokens_as_token_ids": True, "prompt_logprobs": 1},
        {"messages": HI, **SHORT, "ignore_eos": True, "stop": ["a", "e"]},
        {"messages": HI, **SHORT, "return_token_ids": True, "n": 1},
        {"messages": HI, **SHORT, "return_token_ids": True, "logprobs": True, "logprob_token_ids": [65, 7, 65]},
        {"messages": HI, **SHORT, "truncate_prompt_tokens": 4},
        {"messages": HI, **SHORT, "logprob_token_ids": [65]},
        {"messages": HI, "max_tokens": 60, "temperature": 0, "response_format": {"type": "json_object"}},
        {"messages": HI, "max_tokens": 40, "temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}},
        {"messages": HI, "tools": [PICK], **SHORT},
        {"messages": HI, "tools": [PICK], "tool_choice": "none", **SHORT},
        {"messages": HI, "tools": [PICK], "tool_choice": NAMED, "max_tokens": 60, "temperature": 0},
        {"messages": HI, "tools": [PICK], "tool_choice": "required", "parallel_tool_calls": False, **LONG},
        {"messages": HI, "chat_template_kwargs": {"tools": "x"}, "add_special_tokens": True, **SHORT},
        {"messages": HI, "temperature": -1},
        {"messages": HI, "temperature": "hot"},
        {"messages": HI, "max_tokens": 4000},
        {"messages": HI, "top_logprobs": 3},
        {"messages": HI, "logprobs": True, "top_logprobs": 21},
        {"messages": HI, "logit_bias": {"999": 1}},
        {"messages": HI, "echo": True},
        {"messages": HI, "best_of": 2},
        {"messages": HI, "stream_options": {"include_usage": True}},
        {"messages": HI, "tool_choice": "required"},
        {"messages": HI, "tools": [PICK], "tool_choice": "sometimes"},
        {"messages": HI, "tools": [{"type": "function"}]},
        {"messages": HI, "response_format": {"type": "xml"}},
        {"messages": HI, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"messages": HI, "structured_outputs": {"regex": "("}},
        {"messages": HI, "guided_json": {}},
        {"messages": HI, "chat_template_kwargs": {"messages": []}},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {},
    ],
    TEXT: [
        {"prompt": "hi", "temperature": 0, "ignore_eos": True},
        {"prompt": "hi", **SHORT, "model": "an-alias"},
        {"prompt": ["hi", "there"], **SHORT, "n": 2, "seed": 1, "logprobs": 2},
        {"prompt": [[65, 66], [67]], **SHORT, "echo": True, "logprobs": 1},
        {"prompt": ["hi", "\u00e9"], **SHORT, "echo": True, "logprobs": 0, "prompt_logprobs": 2},
        {"prompt": [65, 66, 67], "max_tokens": 0, "echo": True},
        {"prompt": ["hi", "there"], **SHORT, "n": 2, "seed": 1, "return_token_ids": True},
        {"prompt": ["x" * 600, [5] * 600], **SHORT, "truncate_prompt_tokens": 9, "echo": True},
        {"prompt": "x" * 600, **SHORT, "truncate_prompt_tokens": -1, "logprobs": 3, "logprob_token_ids": [7]},
        {"prompt": "hi", "truncate_prompt_tokens": 513},
        {"prompt": "hi", "logprobs": 0, "logprob_token_ids": [258]},
        {"prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": "hi", **SHORT, "prompt_logprobs": 3, "add_special_tokens": False},
        {"prompt": "hi", **SHORT, "suffix": None, "best_of": 1, "logprobs": None},
        {"prompt": "hi", "max_tokens": 0},
        {"prompt": "hi", "suffix": "x"},
        {"prompt": ["hi", ""]},
        {"prompt": ["hi", [999]]},
        {"prompt": [[5], "hi"]},
        {"prompt": "x" * 600},
        {"prompt": "x" * 500, "max_tokens": 30},
        {"prompt": "hi", "n": 0},
        {"prompt": ["hi", "there"], "n": 9000},
        {"prompt": "hi", "logprobs": True},
    ],
    VECTORS: [
        {"input": "hi"},
        {"input": "hi", "model": "an-alias"},
        {"input": ["hi", "there", "hi"], "encoding_format": "base64"},
        {"input": [[65, 66], [67]], "pooling": "last", "normalize": False, "dimensions": 32},
        {"input": ["x" * 600, [65] * 600], "truncate_prompt_tokens": 20, "truncation_side": "right"},
        {"input": "hi", "add_special_tokens": False},
        {"input": "hi", "truncate_prompt_tokens": 0},
        {"input": "hi", "dimensions": 8},
        {"input": ["hi", ""]},
        {"input": []},
        {"input": "hi", "pooling": "max"},
        {"input": "x" * 600},
        {"input": [999]},
    ],
    RESPONSES: [
        {"input": "hi", "max_output_tokens": 5, "temperature": 0},
        {"input": [{"role": "user", "content": "hi"}], "instructions": "Be.", "max_output_tokens": 5, "temperature": 0},
        {"input": "hi", "max_output_tokens": 3, "temperature": 0, "top_logprobs": 2, "truncate_prompt_tokens": 4},
        {"input": "hi", **FORCED, "max_output_tokens": 90, "temperature": 0},
        {"input": "hi", "max_output_tokens": 0},
        {"input": "hi", "max_output_tokens": 4000},
        {"input": "x" * 600},
        {"input": "hi", "previous_response_id": "resp_1"},
        {"input": []},
        {},
    ],
}


@pytest.fixture(scope="module")
def endpoint(tiny_directory):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}tools{% endif %}"
    llm = LLM(tiny_directory, chat_template=template, max_num_seqs=8, kv_cache_tokens=4096)
    endpoint = Endpoint(llm, chat_template=template, names=("test-model", "an-alias"))
    yield endpoint
    endpoint.close()


class Batches:
    """Runner of batches on an endpoint's engine."""

    def __init__(self, root, endpoint):
        self.catalog = Catalog(root)
        answerer = SharedAnswerer(endpoint.frontend)
        self.runner = BatchRunner(self.catalog, answerer, {"model": "fake"}, endpoint.model.names)
        self.runner.start()

    def bodies(self, url, bodies):
        """Return (status, body) of the response to each body."""
        lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": b} for n, b in enumerate(bodies)]
        path = self.catalog.temporary()
        path.write_bytes(content(lines))
        file = self.catalog.add_file(path, "in.jsonl", "batch")
        record = BatchRecord(new_id("batch_"), url, file.id, "1h", int(time.time()) + 600, None)
        self.catalog.add_batch(record)
        self.runner.submit(record.id)
        give_up = time.monotonic() + 100
        while not (record := self.catalog.batch(record.id)).ended:
            assert time.monotonic() < give_up, record
            time.sleep(0.02)
        assert record.status == "completed", record
        files = [file for file in (record.output_file_id, record.error_file_id) if file]
        rows = [row for file in files for row in parsed(self.catalog.content(file).read_bytes())]
        answers = {int(row["custom_id"]): row["response"] for row in rows}
        return [(answers[n]["status_code"], answers[n]["body"]) for n in range(len(bodies))]

    def close(self):
        self.runner.close(5.0)
        self.catalog.close()


@pytest.fixture(scope="module")
def batches(endpoint, tmp_path_factory):
    batches = Batches(tmp_path_factory.mktemp("batches"), endpoint)
    yield batches
    batches.close()


def plain(body):
    """Return a body without what differs between calls: ids, times and cached tokens."""
    body = {name: value for name, value in body.items() if name not in ("id", "created", "created_at")}
    for kind in ("prompt", "input"):
        if f"{kind}_tokens_details" in body.get("usage", {}):
            cached = body["usage"][f"{kind}_tokens_details"].pop("cached_tokens")
            assert 0 <= cached <= body["usage"][f"{kind}_tokens"]
    for item in body.get("output", ()):
        assert item.pop("id") and (item["type"] == "message" or item.pop("call_id").startswith("call_"))
    for item in body.get("data", ()):
        if isinstance(vector := item["embedding"], str):
            item["embedding"] = {"base64": array("f", base64.b64decode(vector)).tolist()}
    for choice in body.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
    return body


@pytest.mark.parametrize("url", BODIES)
def test_row_equals_the_response_of_the_route(endpoint, batches, url, plain_torch):
    asked = [{"model": "test-model", **body} for body in BODIES[url]]
    statuses = set()
    for body, (status, answer) in zip(asked, batches.bodies(url, asked), strict=True):
        response = endpoint.post(url, body)
        assert status == response.status_code, body
        assert alike(plain(answer), plain(response.json()), plain_torch), body
        statuses.add(status)
    assert statuses == {200, 400}


def test_tokens_of_logprobs_have_text_and_bytes(batches):
    bodies = [{"model": "test-model", "messages": HI, **SHORT, "logprobs": True, "top_logprobs": 2}]
    ((_, body),) = batches.bodies(CHAT, bodies)
    entries = body["choices"][0]["logprobs"]["content"]
    for one in (*entries, *(top for entry in entries for top in entry["top_logprobs"])):
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"] != ""
    assert len(entries) == 5


def test_cached_tokens_of_rows_are_counted(endpoint, batches):
    asked = {"model": "test-model", "prompt": ["x" * 100, "y" * 70, "x" * 100], "max_tokens": 2, "logprobs": 1}
    for _ in range(2):  # the second time all whole blocks of 16 are there
        answer = endpoint.completion(**asked, temperature=0.5, seed=3)
        ((_, row),) = batches.bodies(TEXT, [{**asked, "temperature": 0.5, "seed": 4}])
    cached = [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in (answer, row)]
    # a prompt that equals another of the batch runs once, and is not computed for the other
    assert cached == [96 + 64 + 96, 96 + 64 + 100], cached


def test_a_row_has_the_vectors_of_all_its_inputs(endpoint, batches):
    inputs = [f"text {n}" for n in range(20)]
    asked = [{"model": "test-model", "input": inputs}, {"model": "test-model", "input": inputs[7]}]
    (_, many), (_, one) = batches.bodies(VECTORS, asked)
    assert [item["index"] for item in many["data"]] == list(range(20))
    assert many["data"][7]["embedding"] == one["data"][0]["embedding"]
    assert many["usage"]["prompt_tokens"] == sum(map(len, inputs))
    assert endpoint.idle()
