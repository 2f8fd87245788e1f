"""/v1/chat/completions: messages, parts, logprobs, streams, tools."""

from __future__ import annotations

import json
import threading

import pytest

from batchinfer.llm import LLM
from batchinfer.spec import FakeSpec
from batchinfer.text.grammar_trial import Trials
from tests.server.conftest import Endpoint, referring_tool

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_required_fields_are_present(fake):
    body = fake.chat(messages=HI, max_tokens=5, ignore_eos=True)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"]) == 5
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 5


def test_text_parts_equal_the_joined_text(fake):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    asked = {"max_tokens": 8, "temperature": 0}
    whole = fake.chat(messages=[{"role": "user", "content": "h\ni"}], **asked)
    assert (
        fake.chat(messages=[{"role": "user", "content": parts, "name": "me"}], **asked)["choices"] == whole["choices"]
    )
    error = fake.refused(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})
    assert "image_url" in error["message"] and error["param"] == "messages"


def test_max_completion_tokens_wins_over_max_tokens(fake):
    asked = {"messages": HI, "ignore_eos": True}
    assert fake.chat(**asked, max_tokens=3, max_completion_tokens=7)["usage"]["completion_tokens"] == 7
    assert fake.chat(**asked, max_completion_tokens=4)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs_have_bytes_and_alternatives(tiny, top):
    asked = {"messages": HI, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": top}
    content = tiny.chat(**asked)["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert len(entry["top_logprobs"]) == (top or 0)
        if top:
            assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    streamed = [event["choices"][0] for event in tiny.stream(CHAT, **asked)]
    assert [entry for one in streamed if one["logprobs"] for entry in one["logprobs"]["content"]] == content


def test_stream_builds_the_whole_response(fake):
    asked = {"messages": HI, "max_tokens": 20, "temperature": 0, "n": 2, "ignore_eos": True}
    fake.chat(**asked)  # fills the prefix cache: both usages count its tokens
    whole = fake.chat(**asked)
    events = fake.stream(CHAT, **asked, stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["model"], event["created"]) for event in events}) == 1
    *chunks, last = events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert (
            "".join(piece["delta"].get("content", "") for piece in pieces)
            == (whole["choices"][index]["message"]["content"])
        )
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [
            whole["choices"][index]["finish_reason"]
        ]


def test_continuous_usage_stats_put_usage_on_every_chunk(fake):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = fake.stream(CHAT, messages=HI, max_tokens=9, ignore_eos=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 9 and counts[0] >= 1


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ([{"role": "user"}], "no content"),
        ([{"content": "x"}], "role"),
        ("hi", "messages"),
        ([{"role": "user", "content": 5}], "messages"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
    ],
)
def test_wrong_messages_are_refused(fake, messages, said):
    response = fake.post(CHAT, content=json.dumps({"messages": messages}), headers={"content-type": "application/json"})
    assert response.status_code == 400 and said in response.json()["error"]["message"], response.text


def test_error_of_the_template_is_a_400(tiny_directory):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ mood }}x"
    llm = LLM("fake", chat_template=template, fake=FakeSpec(answer_tokens=3))
    endpoint = Endpoint(llm, chat_template=template, chat_kwargs={"mood": "ab"})
    try:
        error = endpoint.refused(CHAT, {"messages": [{"role": "system", "content": "x"}]})
        assert "no system here" in error["message"]
        assert endpoint.chat(messages=HI)["usage"]["prompt_tokens"] == 3
        assert endpoint.chat(messages=HI, chat_template_kwargs={"mood": "abcd"})["usage"]["prompt_tokens"] == 5
        assert endpoint.refused(CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}})
    finally:
        endpoint.close()


def test_tools_need_a_template_that_takes_them(fake, tiny):
    assert "takes no tools" in fake.refused(CHAT, {"messages": HI, "tools": [TOOL]})["message"]
    # "none" leaves them out
    assert fake.chat(messages=HI, tools=[TOOL], tool_choice="none", max_tokens=2)
    body = tiny.chat(messages=HI, tools=[TOOL], max_tokens=2)
    assert body["usage"]["prompt_tokens"] == tiny.chat(messages=HI, max_tokens=2)["usage"]["prompt_tokens"] + len(
        "tools"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_choice": "required"},
        {"tools": [{"type": "function"}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": "sometimes"},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
    ],
)
def test_wrong_tools_are_refused(tiny, wrong):
    assert tiny.refused(CHAT, {"messages": HI, **wrong})["param"] in ("tools", "tool_choice")


def test_tool_calls_in_messages_reach_the_template():
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}"
    template = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    endpoint = Endpoint(LLM("fake", chat_template=template), chat_template=template)
    try:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1234}'}}
        messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
        assert endpoint.chat(messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == len("hi1234")
    finally:
        endpoint.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_tool_call_follows_its_schema(tiny, choice):
    asked = {
        "messages": HI,
        "tools": [referring_tool("add")],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }
    choice = tiny.chat(**asked, temperature=0)["choices"][0]
    if choice["finish_reason"] == "length":
        pytest.fail(f"not ended: {choice}")
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"])["a"] in (1, 2)
    events = tiny.stream(CHAT, **asked, temperature=0)
    deltas = [event["choices"][0]["delta"] for event in events]
    (streamed,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert streamed["function"] == call["function"] and streamed["index"] == 0
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_answer_follows_the_response_format(tiny):
    schema = {
        "type": "object",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = tiny.chat(messages=HI, response_format=form, max_tokens=100, temperature=0)
    assert isinstance(json.loads(body["choices"][0]["message"]["content"])["b"], bool)
    body = tiny.completion(prompt="x", structured_outputs={"choice": ["yes", "no"]}, max_tokens=10)
    assert body["choices"][0]["text"] in ("yes", "no")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    tiny.refused(CHAT, {"messages": HI, "response_format": bad})
    tiny.chat(messages=HI, max_tokens=1)  # it lives on


def test_response_format_text_is_accepted_and_unknown_ones_refused(fake):
    assert fake.chat(messages=HI, response_format={"type": "text"}, max_tokens=1)
    for wrong in ({"type": "yaml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}):
        assert fake.refused(CHAT, {"messages": HI, "response_format": wrong})["param"] == "response_format"


def test_prompt_logprobs_of_a_chat_cover_its_prompt(tiny):
    body = tiny.chat(messages=HI, max_tokens=1, prompt_logprobs=1)
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


HERMES = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"


def test_forced_call_in_the_models_own_format_is_parsed(tiny_directory):
    llm = LLM(tiny_directory, chat_template=HERMES, max_num_seqs=2, kv_cache_tokens=1024)
    endpoint = Endpoint(llm, chat_template=HERMES)
    try:
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
        forced = {"type": "function", "function": {"name": "add"}}
        asked = {"messages": HI, "tools": [tool], "tool_choice": forced, "max_tokens": 200, "temperature": 0}
        choice = endpoint.chat(**asked)["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert json.loads(call["function"]["arguments"])["a"] in (1, 2)
        events = endpoint.stream(CHAT, **asked)
        pieces = [event["choices"][0]["delta"].get("tool_calls", []) for event in events]
        assert "".join(one[0]["function"]["arguments"] for one in pieces if one) == call["function"]["arguments"]
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    finally:
        endpoint.close()


def test_slow_grammar_does_not_delay_other_requests(tiny, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def held(trials, source):
        begun.set()
        assert go.wait(20)
        return "too large"

    monkeypatch.setattr(Trials, "problem", held)
    slow = [
        tiny.begin(tiny.client.post(CHAT, json={"messages": HI, "structured_outputs": {"regex": f"a{{{1000 + n}}}"}}))
        for n in range(6)
    ]
    assert begun.wait(20)
    assert tiny.chat(messages=HI, max_tokens=2, temperature=0) and not any(one.done() for one in slow)
    go.set()
    assert [one.result(20).status_code for one in slow] == [400] * 6


def test_hostile_regular_expression_is_a_400(tiny):
    error = tiny.refused(CHAT, {"messages": HI, "structured_outputs": {"regex": "a{1000000000}"}})
    assert error["param"] == "structured_outputs" and "too large" in error["message"]
    assert tiny.chat(messages=HI, max_tokens=5, structured_outputs={"regex": "ab"})["choices"][0]["message"]["content"]
