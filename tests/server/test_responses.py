"""/v1/responses, whole and streamed, through plain HTTP and through OpenAI's client."""

from __future__ import annotations

import json
from typing import Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import Endpoint, fake_llm

RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}


def asked(endpoint, call):
    """Return the result of `call` with OpenAI's client on a real server."""

    async def run():
        transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(endpoint.gate))
        async with openai.AsyncOpenAI(
            base_url="http://endpoint/v1", api_key="x", max_retries=0, http_client=transport
        ) as client:
            return await call(client)

    return endpoint.wait(run())


def events(endpoint, **body):
    response = endpoint.post(RESPONSES, {**body, "stream": True})
    assert response.status_code == 200, response.text
    parts = [part.split("\n") for part in response.text.split("\n\n") if part]
    values = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [value["type"] for value in values]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    return values


def less_ids(value):
    """Return a response without what differs between calls."""
    if isinstance(value, dict):
        left = {name: less_ids(entry) for name, entry in value.items()}
        return {name: entry for name, entry in left.items() if name not in ("id", "created_at", "call_id", "item_id")}
    return [less_ids(entry) for entry in value] if isinstance(value, list) else value


def test_client_reads_a_text_answer(fake):
    async def call(client):
        given = {"model": "test-model", "max_output_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answer = await client.responses.create(**given, input="hi", instructions="Be brief.", metadata={"a": "b"})
        parts = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
        again = await client.responses.create(**given, input=parts, instructions="Be brief.", store=True, user="me")
        async for event in await client.responses.create(**given, input=parts, stream=True):
            event.model_dump_json(warnings="error")
        return answer, again

    answer, again = asked(fake, call)
    answer.model_dump_json(warnings="error")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = fake.chat(messages=messages, max_tokens=6, temperature=0, ignore_eos=True)
    assert answer.output_text == again.output_text == chat["choices"][0]["message"]["content"]
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == 6 and answer.usage.total_tokens == answer.usage.input_tokens + 6
    assert answer.usage.input_tokens_details.cached_tokens >= 0 == answer.usage.output_tokens_details.reasoning_tokens
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief." and answer.object == "response"
    assert answer.model_dump()["store"] is False and again.model_dump()["store"] is False
    (message,) = answer.output
    assert message.type == "message" and message.role == "assistant" and message.id.startswith("msg_")


def test_an_answer_that_ends_by_itself_is_complete(fake):
    body = fake.ok(RESPONSES, input="hi", temperature=0)
    assert body["status"] == "completed" and body["incomplete_details"] is None and body["error"] is None
    assert body["output"][0]["status"] == "completed" and body["temperature"] == 0


def test_events_of_a_text_come_in_order(fake):
    given = {"input": "hi", "max_output_tokens": 5, "temperature": 0, "ignore_eos": True}
    whole = fake.ok(RESPONSES, **given)
    found = events(fake, **given)
    text = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(text),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert text and "".join(text) == whole["output"][0]["content"][0]["text"]
    created, _, added, part = found[:4]
    assert created["response"]["status"] == "in_progress" and created["response"]["output"] == []
    assert added["item"]["content"] == [] and part["part"]["text"] == ""
    assert len({event["item_id"] for event in found if "item_id" in event}) == 1
    assert less_ids(found[-1]["response"]) == less_ids(whole)
    assert found[-2]["item"] == found[-1]["response"]["output"][0]


def test_client_reads_a_stream(fake):
    async def call(client):
        async with client.responses.stream(model="test-model", input="hi", temperature=0) as stream:
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return texts, await stream.get_final_response()

    texts, final = asked(fake, call)
    assert final.status == "completed" and "".join(texts) == final.output_text and texts


def test_logprobs_come_with_the_text(tiny):
    given = {"input": "hi", "max_output_tokens": 3, "temperature": 0, "top_logprobs": 2}
    body = tiny.ok(RESPONSES, **given, include=["message.output_text.logprobs"])
    entries = body["output"][0]["content"][0]["logprobs"]
    chat = tiny.chat(
        messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert entries == chat["choices"][0]["logprobs"]["content"] and body["top_logprobs"] == 2
    found = [event for event in events(tiny, **given) if event["type"] == "response.output_text.delta"]
    assert [entry for event in found for entry in event["logprobs"]] == entries
    plain = tiny.ok(RESPONSES, input="hi", max_output_tokens=3, temperature=0)
    assert plain["output"][0]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("last", ["257", "240"])
def test_a_stream_has_the_logprobs_of_tokens_without_text(tiny, last):
    """Of the token that ends an answer, and of half a character."""
    given = {"input": "hi", "max_output_tokens": 4, "temperature": 0, "top_logprobs": 1, "logit_bias": {last: 100}}
    (part,) = tiny.ok(RESPONSES, **given)["output"][0]["content"]
    found = events(tiny, **given)
    assert part["logprobs"] and found[-1]["response"]["output"][0]["content"] == [part]
    told = [entry for event in found if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert told == part["logprobs"]


def test_text_follows_the_schema(tiny):
    class Choice(BaseModel):
        a: Literal[1, 2]

    async def call(client):
        given = {"model": "test-model", "input": "hi", "temperature": 0, "max_output_tokens": 100}
        text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
        plain = await client.responses.create(**given, text=text)
        parsed = await client.responses.parse(**given, text_format=Choice)
        return plain, parsed

    plain, parsed = asked(tiny, call)
    assert json.loads(plain.output_text)["a"] in (1, 2) and plain.text.format.name == "x"
    assert isinstance(parsed.output_parsed, Choice)
    anything = tiny.ok(
        RESPONSES, input="hi", text={"format": {"type": "json_object"}}, max_output_tokens=80, temperature=0
    )
    assert anything["output"][0]["content"][0]["text"].startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_client_reads_a_function_call(hermes, choice):
    given = {"model": "test-model", "input": "hi", "tools": [ADD], "tool_choice": choice, "temperature": 0}

    async def call(client):
        answer = await client.responses.create(**given, parallel_tool_calls=False, max_output_tokens=200)
        async with client.responses.stream(**given, parallel_tool_calls=False, max_output_tokens=200) as stream:
            kinds = [event.type async for event in stream]
            return answer, kinds, await stream.get_final_response()

    answer, kinds, streamed = asked(hermes, call)
    answer.model_dump_json(warnings="error")
    (item,) = answer.output
    assert item.type == "function_call" and item.name == "add" and json.loads(item.arguments)["a"] in (1, 2)
    assert item.call_id.startswith("call_") and item.id.startswith("fc_") and answer.status == "completed"
    (same,) = streamed.output
    assert (same.name, same.arguments) == (item.name, item.arguments)
    deltas = kinds.count("response.function_call_arguments.delta")
    assert deltas and [kind.removeprefix("response.") for kind in kinds] == [
        *("created", "in_progress", "output_item.added"),
        *["function_call_arguments.delta"] * deltas,
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]


def test_a_conversation_with_calls_reaches_the_template(hermes):
    items = [
        {"role": "developer", "content": "Be exact."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    second = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "system", "content": "Short.\n\nBe exact."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "Let", "tool_calls": [{"id": "c1", **call}, {"id": "c2", **second}]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
    ]
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
    chat = hermes.chat(messages=messages, tools=[tool], max_tokens=4, temperature=0)
    body = hermes.ok(RESPONSES, input=items, instructions="Short.", tools=[ADD], max_output_tokens=4, temperature=0)
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert body["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    # a call without a text before it is a turn of its own
    assert hermes.ok(RESPONSES, input=[*items[:2], *items[4:]], max_output_tokens=1)


def test_output_is_accepted_as_input_of_the_next_turn(hermes):
    forced = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    first = hermes.ok(RESPONSES, input="hi", **forced, temperature=0, max_output_tokens=200)
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "3"}
    more = [{"role": "user", "content": "hi"}, *first["output"], result]
    text = hermes.ok(RESPONSES, input=more, max_output_tokens=3, temperature=0)
    assert hermes.ok(RESPONSES, input=[*more, *text["output"], {"role": "user", "content": "x"}], max_output_tokens=1)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input", "robot"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_image"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "input_file"),
        ({"input": [{"role": "user", "content": None}]}, "input", "content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"type": {"a": 1}}]}, "input", "not supported"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "call_id"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input", "not JSON"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stored"),
        ({"conversation": {"id": "x"}}, "conversation", "stored"),
        ({"background": True}, "background", "stored"),
        ({"prompt": {"id": "x"}}, "input", "prompt"),
        ({"truncation": "auto"}, "truncation", "truncation"),
        ({"max_tokens": 5}, "max_output_tokens", "use max_output_tokens"),
        ({"messages": []}, "input", "use input"),
        ({"response_format": {"type": "text"}}, "text", "use text.format"),
        ({"n": 2}, "n", "one sample"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "context"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"top_p": 2}, "top_p", "top_p"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"seed": "x"}, "seed", "seed"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools", "object"),
        ({"tools": [ADD], "tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "add"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"text": {"format": {"type": "xml"}}}, "text", "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "schema"),
        ({"text": {"verbosity": "low"}}, "text", "verbosity"),
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_unsupported_fields_are_refused(tiny, body, param, said, stream):
    error = tiny.refused(RESPONSES, {"input": "hi", **body, "stream": stream} if body else {"stream": stream})
    assert error["param"] == param and said in error["message"], error


def test_harmless_fields_are_accepted(fake):
    given = {
        "previous_response_id": None,
        "background": False,
        "truncation": "disabled",
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "prompt_cache_key": "x",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "stream_options": {"include_obfuscation": False},
        "a_new_field": {"b": 1},
        "seed": 3,
        "stop": ["zzz"],
    }
    assert events(fake, input="hi", max_output_tokens=2, **given)[-1]["type"] == "response.incomplete"


def test_defaults_without_a_field_here_are_switched_off(tiny_directory):
    llm = fake_llm()
    llm.default_params = type(llm.default_params)(n=3, logprobs=2, prompt_logprobs=1, logprob_token_ids=[5])
    endpoint = Endpoint(llm)
    try:
        body = endpoint.ok(RESPONSES, input="hi", max_output_tokens=3)
        assert len(body["output"]) == 1 and body["output"][0]["content"][0]["logprobs"] == []
        assert events(endpoint, input="hi", max_output_tokens=3)[-1]["response"]["usage"]["output_tokens"] <= 3
    finally:
        endpoint.close()


def test_an_answer_that_breaks_off_ends_with_failed(held):
    endpoint, runner = held
    given = {"input": "x", "stream": True, "max_output_tokens": 50, "ignore_eos": True}
    call = endpoint.begin(endpoint.client.post(RESPONSES, json=given))
    runner.breaks(after=3)
    response = call.result(20)
    last = json.loads(response.text.strip().split("\n")[-1].removeprefix("data: "))
    assert response.status_code == 200 and "[DONE]" not in response.text
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert "broken" in last["response"]["error"]["message"]


def test_unknown_model_and_missing_template_are_errors(fake):
    assert fake.refused(RESPONSES, {"input": "x", "model": "other"}, 404)["code"] == "model_not_found"
    endpoint = Endpoint(fake_llm(), chat_template=None)
    try:
        assert "chat template" in endpoint.refused(RESPONSES, {"input": "x"})["message"]
    finally:
        endpoint.close()
