"""Fuzzing of /v1/responses and /v1/messages: whatever a field holds, the response is a 200 or a 400."""

from __future__ import annotations

import json
import random

import pytest

from batchinfer.llm import LLM
from batchinfer.openai.json_text import dump_json
from batchinfer.spec import FakeSpec
from tests.server.conftest import HERMES, Endpoint
from tests.server.test_messages import TOOL
from tests.server.test_responses import ADD

RESPONSE = {
    "input": [
        {"role": "developer", "content": "x"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "o"},
    ],
    "instructions": "i",
    "tools": [ADD],
    "tool_choice": "auto",
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    "include": ["a"],
    "top_logprobs": 1,
    "metadata": {"a": "b"},
    "max_output_tokens": 3,
    "truncate_prompt_tokens": 5,
    "stop": ["x"],
    "stream": False,
    "user": "u",
}
MESSAGE = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}],
        },
    ],
    "system": [{"type": "text", "text": "s"}],
    "tools": [TOOL],
    "tool_choice": {"type": "auto"},
    "max_tokens": 3,
    "stop_sequences": ["q"],
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low"},
    "stream": False,
}
ODD = [
    *(None, True, 0, -1, 1.5, 1 << 70, float("nan"), "", "\ud800", "x", [], {}, [[]], [None], ["\ud800"]),
    *({"type": None}, {"type": []}, [{"type": "text", "text": "\ud800"}], {"a": {"b": []}}),
]


@pytest.fixture(scope="module")
def endpoint():
    llm = LLM("fake", fake=FakeSpec(answer_tokens=(1, 4)), chat_template=HERMES, max_model_len=512)
    endpoint = Endpoint(llm, chat_template=HERMES)
    yield endpoint
    endpoint.close()


def places(value, place=()):
    yield place
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(entry, (*place, key))


def put(value, place, new):
    if not place:
        return new
    key, *rest = place
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = put(value[key], rest, new)
    return changed


@pytest.mark.parametrize(("path", "body"), [("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)])
def test_odd_field_is_answered_with_200_or_400(endpoint, path, body):
    chance = random.Random(7)
    tried = [(place, odd) for place in places(body) for odd in ODD]
    for place, odd in chance.sample(tried, 250):
        given = put(body, place, odd)
        if isinstance(given, dict) and place != ("stream",):
            given = {**given, "stream": chance.random() < 0.5}
        response = endpoint.post(path, content=json.dumps(given), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (place, odd, response.text)
        assert response.status_code == 400 or "event: error" not in response.text, (place, odd)
        assert "response.failed" not in response.text, (place, odd)
    assert endpoint.idle()


def test_large_integers_and_lone_surrogates_are_written_back(endpoint):
    tool = {**ADD, "parameters": {"type": "object", "properties": {"a": {"maximum": 1 << 70, "title": "\ud800"}}}}
    body = {"input": "x", "tools": [tool], "max_output_tokens": 1}
    response = endpoint.post("/v1/responses", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert response.json()["tools"][0]["parameters"]["properties"]["a"]["maximum"] == 1 << 70
    assert json.loads(dump_json({"a": [1 << 70, float("inf"), "\ud800"]})) == {"a": [1 << 70, None, "\\ud800"]}
