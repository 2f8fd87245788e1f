"""/v1/messages, through plain HTTP and through Anthropic's client."""

from __future__ import annotations

import json

import httpx2
import pytest

from batchinfer.server.app import AppOptions
from tests.server.conftest import Endpoint, fake_llm
from tests.server.test_responses import ADD, SCHEMA

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


def events(endpoint, **body):
    response = endpoint.post(MESSAGES, {"max_tokens": 20, **body, "stream": True})
    assert response.status_code == 200, response.text
    parts = [part.split("\n") for part in response.text.split("\n\n") if part]
    values = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name.removeprefix("event: ") for name, _ in parts] == [value["type"] for value in values]
    return values


def refused(endpoint, body, status=400, path=MESSAGES):
    """Post a body that must be refused; return the error object after checking its fields."""
    response = endpoint.post(path, body)
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"type", "error"} and answer["type"] == "error", answer
    assert set(answer["error"]) == {"type", "message"} and answer["error"]["message"]
    return answer["error"]


def test_text_answer_is_one_block(fake):
    given = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    answer = fake.ok(MESSAGES, **given, system="Be brief.", messages=HI, metadata={"user_id": "me"}, top_k=5)
    chat = fake.chat(messages=[{"role": "system", "content": "Be brief."}, *HI], **given)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "test-model",
        "content": [{"type": "text", "text": chat["choices"][0]["message"]["content"]}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": chat["usage"]["prompt_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 6,
        },
    }
    blocks = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    system = [{"type": "text", "text": "Be brief."}]
    again = fake.ok(MESSAGES, **given, system=system, messages=[{"role": "user", "content": blocks}])
    assert again["content"] == answer["content"]
    assert fake.ok(MESSAGES, max_tokens=500, messages=HI)["stop_reason"] == "end_turn"
    assert fake.ok(COUNT, system=system, messages=HI) == {"input_tokens": answer["usage"]["input_tokens"]}


def test_answer_ends_at_the_context_before_max_tokens(tiny):
    given = {"messages": HI, "max_tokens": 32000, "temperature": 0, "ignore_eos": True}
    answer = tiny.ok(MESSAGES, **given)
    used = answer["usage"]
    assert used["input_tokens"] + used["output_tokens"] == 512
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert events(tiny, **given)[-2]["delta"]["stop_reason"] == answer["stop_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequence_that_ended_the_answer_is_named(tiny, stream):
    given = {"messages": HI, "max_tokens": 9, "temperature": 0, "allowed_token_ids": [97]}
    for stops, text, reason, found in (
        (["zz", "aaa"], "", "stop_sequence", "aaa"),
        (["zz"], "a" * 9, "max_tokens", None),
        ([], "a" * 9, "max_tokens", None),
    ):
        if stream:
            seen = events(tiny, **given, stop_sequences=stops)
            said = "".join(event["delta"]["text"] for event in seen if event["type"] == "content_block_delta")
            end = seen[-2]["delta"]
        else:
            end = tiny.ok(MESSAGES, **given, stop_sequences=stops)
            said = end["content"][0]["text"]
        assert (said, end["stop_reason"], end["stop_sequence"]) == (text, reason, found)


def test_events_of_a_text_come_in_order(fake):
    given = {"messages": HI, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    whole = fake.ok(MESSAGES, **given)
    found = events(fake, **given)
    deltas = [event for event in found if event["type"] == "content_block_delta"]
    assert [event["type"] for event in found] == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * len(deltas),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    begun = found[0]["message"]
    assert begun["content"] == [] and begun["stop_reason"] is None and begun["model"] == "test-model"
    assert begun["usage"] == {**whole["usage"], "output_tokens": 0}
    assert found[2]["content_block"] == {"type": "text", "text": ""} and found[2]["index"] == 0
    assert {event["delta"]["type"] for event in deltas} == {"text_delta"}
    assert "".join(event["delta"]["text"] for event in deltas) == whole["content"][0]["text"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"] == whole["usage"]


@pytest.mark.parametrize("choice", [FORCED["tool_choice"], {"type": "tool", "name": "add"}])
@pytest.mark.parametrize("endpoint", ["hermes", "tiny"])  # in the model's own format, and as JSON alone
def test_tool_call_is_a_tool_use_block(request, endpoint, choice):
    hermes = request.getfixturevalue(endpoint)
    given = {"messages": HI, "max_tokens": 200, "temperature": 0, "tools": [TOOL], "tool_choice": choice}
    answer = hermes.ok(MESSAGES, **given)
    (block,) = answer["content"]
    assert block["type"] == "tool_use" and block["name"] == "add" and block["id"].startswith("toolu_")
    assert block["input"]["a"] in (1, 2) and answer["stop_reason"] == "tool_use"
    found = events(hermes, **given)
    begun = next(event for event in found if event["type"] == "content_block_start")["content_block"]
    assert begun["name"] == "add" and begun["input"] == {} and begun["id"]
    written = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in written} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in written)) == block["input"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_cut_off_call_has_empty_input(hermes):
    answer = hermes.ok(MESSAGES, messages=HI, max_tokens=45, temperature=0, **FORCED)
    assert answer["stop_reason"] == "max_tokens"
    assert (
        events(hermes, messages=HI, max_tokens=45, temperature=0, **FORCED)[-2]["delta"]["stop_reason"] == "max_tokens"
    )


def test_a_conversation_with_calls_reaches_the_template(hermes):
    turn = [
        {"type": "thinking", "thinking": "Hm", "signature": "x"},
        {"type": "text", "text": "Let"},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "c2", "name": "add", "input": {"a": 2}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "one", "is_error": False},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"type": "text", "text": "go"},
    ]
    given = {"system": "Short.", "tools": [TOOL], "temperature": 0, "max_tokens": 4}
    messages = [*HI, {"role": "assistant", "content": turn}, {"role": "user", "content": results}]
    body = hermes.ok(MESSAGES, messages=messages, **given)
    calls = [
        {"id": f"c{a}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {a}}}'}} for a in (1, 2)
    ]
    same = [
        {"role": "system", "content": "Short."},
        *HI,
        {"role": "assistant", "content": "Let", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "user", "content": "go"},
    ]
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
    chat = hermes.chat(messages=same, tools=[tool], temperature=0, max_tokens=4)
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert body["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    counted = hermes.ok(COUNT, messages=messages, system="Short.", tools=[TOOL])
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]
    empty = [{"type": "tool_result", "tool_use_id": "c1"}, {"type": "tool_result", "tool_use_id": "c2", "content": []}]
    assert hermes.ok(MESSAGES, messages=[*messages[:2], {"role": "user", "content": empty}], **given)


def test_answer_continues_the_last_assistant_message(fake):
    given = {"messages": [*HI, {"role": "assistant", "content": "The answer (is"}], "max_tokens": 4, "temperature": 0}
    answer = fake.ok(MESSAGES, **given, ignore_eos=True)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer (is"
    plain = fake.completion(prompt=prompt, max_tokens=4, temperature=0, ignore_eos=True)
    assert answer["content"][0]["text"] == plain["choices"][0]["text"]
    assert answer["usage"]["input_tokens"] == len(prompt)


def test_text_follows_the_output_format(tiny):
    form = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    answer = tiny.ok(MESSAGES, messages=HI, max_tokens=80, temperature=0, output_config=form)
    assert json.loads(answer["content"][0]["text"])["a"] in (1, 2)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": None, "content": "x"}]}, "got null"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": []}]}, "content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "'int' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{}]}]}]},
            "content[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, "id and name"),
        ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "server_tool_use"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop": ["x"]}, "use stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"input_schema": {}}]}, "name"),
        ({"tools": [{"name": "f", "input_schema": 3}]}, "object"),
        ({"tools": [ADD]}, "function"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "add"),
        ({"tools": [TOOL], "tool_choice": {"type": "sometimes"}}, "sometimes"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"n": 2}, "one sample"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_unsupported_fields_are_refused(tiny, body, said, stream):
    error = refused(tiny, {"messages": HI, "max_tokens": 5, "stream": stream, **body})
    assert error["type"] == "invalid_request_error" and said in error["message"], error


def test_harmless_fields_are_accepted(fake):
    given = {
        "thinking": {"type": "disabled"},
        "tool_choice": {"type": "none"},
        "tools": [TOOL],
        "service_tier": "auto",
        "stop_sequences": ["zzz"],
        "context_management": {"edits": []},
        "a_new_field": {"b": 1},
        "seed": 3,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    body = {"messages": HI, "max_tokens": 3, **given}
    assert fake.post(f"{MESSAGES}?beta=true", body, headers=headers).status_code == 200


def test_errors_have_anthropics_form_on_every_path():
    endpoint = Endpoint(fake_llm(), AppOptions(api_key="s3cret", max_body_bytes=1000))
    body = {"messages": HI, "max_tokens": 3}
    try:
        assert refused(endpoint, body, 401)["type"] == "authentication_error"
        assert endpoint.post(MESSAGES, body, headers={"x-api-key": "s3cret"}).status_code == 200
        assert endpoint.post(MESSAGES, body, headers={"x-api-key": "other"}).status_code == 401
        assert endpoint.post(COUNT, body, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        headers = {"x-api-key": "s3cret"}
        for path, sent, status, kind in (
            (MESSAGES, {**body, "model": "other"}, 404, "not_found_error"),
            (COUNT, {**body, "model": "other"}, 404, "not_found_error"),
            (MESSAGES, {"messages": [{"role": "user", "content": "x" * 1000}]}, 413, "request_too_large"),
            (MESSAGES + "/nothing", {}, 404, "not_found_error"),
        ):
            response = endpoint.post(path, sent, headers=headers)
            assert response.status_code == status and response.json()["error"]["type"] == kind, response.text
        endpoint.gate.draining = True
        response = endpoint.post(MESSAGES, body, headers=headers)
        assert response.status_code == 503 and response.json()["error"]["type"] == "overloaded_error"
    finally:
        endpoint.close()


def test_broken_off_stream_ends_with_an_error_event(held):
    endpoint, runner = held
    given = {"messages": HI, "stream": True, "max_tokens": 50, "ignore_eos": True}
    call = endpoint.begin(endpoint.client.post(MESSAGES, json=given))
    runner.breaks(after=3)
    response = call.result(20)
    assert response.status_code == 200 and "[DONE]" not in response.text
    name, data = response.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"


def test_anthropics_client_reads_whole_and_streamed_answers(hermes):
    anthropic = pytest.importorskip("anthropic")

    async def run():
        transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(hermes.gate))
        given = {"model": "test-model", "extra_body": {"temperature": 0}}
        async with anthropic.AsyncAnthropic(
            base_url="http://endpoint", api_key="x", max_retries=0, http_client=transport
        ) as client:
            text = await client.messages.create(**given, max_tokens=5, messages=HI)
            async with client.messages.stream(**given, max_tokens=5, messages=HI) as stream:
                streamed = await stream.get_final_message()
            forced = {"messages": HI, "max_tokens": 200, **FORCED}
            called = await client.messages.create(**given, **forced)
            async with client.messages.stream(**given, **forced) as stream:
                called_again = await stream.get_final_message()
            result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "3"}
            more = [*HI, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
            await client.messages.create(**given, max_tokens=2, messages=more, tools=[TOOL])
            count = await client.messages.count_tokens(model="test-model", messages=HI)
            with pytest.raises(anthropic.BadRequestError, match="messages is empty"):
                await client.messages.create(**given, max_tokens=5, messages=[])
            return text, streamed, called, called_again, count

    text, streamed, called, called_again, count = hermes.wait(run())
    for message in (text, called):
        message.model_dump_json(warnings="error")
    assert streamed.content[0].text == text.content[0].text and streamed.usage.output_tokens == 5
    assert called.content[0].input == called_again.content[0].input and called.stop_reason == "tool_use"
    assert count.input_tokens == text.usage.input_tokens


def test_metrics_count_both_routes(fake):
    def requests():
        found = [
            line
            for line in fake.get("/metrics").text.splitlines()
            if line.startswith("batchinfer_request_seconds_count")
        ]
        return float(found[0].split()[1])

    before = requests()
    fake.ok(MESSAGES, messages=HI, max_tokens=2)
    fake.ok("/v1/responses", input="hi", max_output_tokens=2)
    events(fake, messages=HI)
    assert requests() == before + 3
