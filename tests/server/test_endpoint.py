"""All routes alike: errors, API keys, body sizes, request ids, models, tokens, back-pressure, metrics, shutdown."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import pytest

from batchinfer.server.app import AppOptions
from batchinfer.server.engine_loop import Event
from batchinfer.server.errors import ApiError
from tests.server.conftest import Endpoint, error_of, events_of, fake_llm

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"prompt": ""}, "empty", "prompt"),
        ({"prompt": []}, "empty", "prompt"),
        ({"prompt": [""]}, "empty", "prompt"),
        ({"prompt": [[]]}, "empty", "prompt"),
        ({}, "required", "prompt"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"prompt": [1, "a"]}, "prompt", "prompt"),
        ({"prompt": [258]}, "out of vocabulary", None),
        ({"prompt": [-1]}, "prompt", "prompt"),
        ({"prompt": "x", "logit_bias": {"999": 1}}, "999.*258", "logit_bias"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "logit_bias"),
        ({"prompt": "x", "logprobs": 21}, "20", "logprobs"),
        ({"prompt": "x", "logprobs": -1}, "logprobs", "logprobs"),
        ({"prompt": "x", "logprobs": True}, "integer", "logprobs"),
        ({"prompt": "x", "seed": 1 << 63}, "seed", "seed"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens"),
        ({"prompt": "x", "max_tokens": "7"}, "integer", "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature", "temperature"),
        ({"prompt": "x", "stop": [""]}, "stop", "stop"),
        ({"prompt": "x", "n": 0}, "n must", "n"),
        ({"prompt": ["x"] * 100, "n": 1000}, "samples", "n"),
        ({"prompt": "x", "best_of": 2}, "best_of", "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search", "use_beam_search"),
        ({"prompt": "x", "guided_json": {}}, "structured_outputs", "guided_json"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream: true", "stream_options"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_body_is_refused_with_its_field(fake, body, said, param, stream):
    if stream and "stream_options" in body:
        pytest.skip("allowed in a stream")
    error = fake.refused(COMPLETIONS, {**body, **({"stream": True} if stream else {})})
    assert re.search(said, error["message"]), error
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert fake.idle()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_nan_and_infinity_are_refused(fake, number):
    response = fake.post(COMPLETIONS, content=f'{{"prompt": "x", "temperature": {number}}}', headers=JSON)
    assert response.status_code == 400 and error_of(response)


def test_unknown_and_null_fields_are_accepted(fake):
    body = {
        "prompt": "x",
        "max_tokens": 2,
        "some_new_field": {"a": 1},
        "user": "me",
        "best_of": 1,
        "suffix": None,
        "repetition_penalty": 1.1,
        "min_p": 0.1,
        "top_k": -1,
        "logprobs": None,
        "stop": None,
        "stream": None,
        "n": None,
    }
    assert fake.completion(**body)["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"prompt": "x"}', {"content-type": "text/plain"}),
        (b'{"prompt": "x"}', {}),
        (b"{", JSON),
        (b"[]", JSON),
        (b'"x"', JSON),
        (b"\xff\xfe", JSON),
        (b"", JSON),
    ],
)
def test_body_that_is_no_json_object_is_a_400(fake, content, headers):
    response = fake.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400 and error_of(response)["type"] == "invalid_request_error"


def test_too_long_prompt_has_its_own_code(fake):
    for path, body in (
        (COMPLETIONS, {"prompt": "x" * 2048}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
    ):
        assert fake.refused(path, body)["code"] == "context_length_exceeded"
    error = fake.refused(COMPLETIONS, {"prompt": "x" * 2000, "max_tokens": 49})
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert fake.completion(prompt="x" * 2000, max_tokens=48)


def test_unknown_route_method_and_model_are_errors(fake):
    assert error_of(fake.get("/v1/nothing")) and fake.get("/v1/nothing").status_code == 404
    assert fake.get(COMPLETIONS).status_code == 405 and error_of(fake.get(COMPLETIONS))
    for body in ({"prompt": "x", "model": "other"}, {"prompt": "x", "model": "\ud800"}):
        response = fake.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
        assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_models_route_lists_the_served_name(fake):
    body = fake.get("/v1/models").json()
    assert body["object"] == "list" and body["data"][0]["id"] == "test-model" and body["data"][0]["object"] == "model"
    assert fake.get("/v1/models/test-model").json() == body["data"][0]
    assert fake.get("/v1/models/other").status_code == 404


def test_model_may_have_several_names_with_slashes():
    endpoint = Endpoint(fake_llm(), names=("org/name", "short"))
    try:
        assert endpoint.get("/v1/models/org/name").json()["id"] == "org/name"
        assert endpoint.completion(prompt="x", model="short")["model"] == "short"
        assert endpoint.completion(prompt="x")["model"] == "org/name"
    finally:
        endpoint.close()


@pytest.mark.parametrize("root", ["", "/v1"])
def test_tokenize_and_detokenize_are_inverse(tiny, root):
    info = tiny.get(f"{root}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == ("</s>", "<s>", None)
    assert "messages" in info["chat_template"]
    found = tiny.ok(f"{root}/tokenize", prompt="ab</s>é", add_special_tokens=False, return_token_strs=True)
    assert found["tokens"] == [97, 98, 257, 195, 169] and found["count"] == 5
    assert found["token_strs"] == ["a", "b", "</s>", "Ã", "©"]  # as the vocabulary has them
    assert tiny.ok(f"{root}/detokenize", tokens=found["tokens"]) == {"prompt": "ab</s>é"}
    chat = tiny.ok(f"{root}/tokenize", messages=HI)
    assert bytes(chat["tokens"]).decode() == "[user]hi\n"
    assert "vocabulary" in tiny.refused(f"{root}/detokenize", {"tokens": [258]})["message"]
    assert tiny.refused(f"{root}/tokenize", {})
    assert tiny.ok(f"{root}/tokenize", prompt="")["tokens"] == []


def test_embeddings_are_normalized_and_packed_on_request(tiny):
    import base64
    import struct

    body = tiny.ok("/v1/embeddings", input=["one", "two"])
    assert body["usage"]["prompt_tokens"] == 6 and [entry["index"] for entry in body["data"]] == [0, 1]
    vector = body["data"][0]["embedding"]
    assert len(vector) == 32 and abs(sum(value * value for value in vector) - 1) < 1e-6
    packed = tiny.ok("/v1/embeddings", input=list(b"one"), encoding_format="base64")["data"][0]["embedding"]
    assert struct.unpack("<32f", base64.b64decode(packed)) == pytest.approx(vector, abs=1e-6)
    ways = [
        tiny.ok("/v1/embeddings", input="one", pooling=way)["data"][0]["embedding"] for way in ("mean", "last", "cls")
    ]
    assert ways[0] == pytest.approx(vector, abs=1e-6) and ways[1] != ways[2]
    assert tiny.refused("/v1/embeddings", {"input": "one", "dimensions": 3})["param"] == "dimensions"
    assert tiny.refused("/v1/embeddings", {"input": ""})["param"] == "input"


def test_request_id_is_echoed_or_generated(fake):
    assert fake.get("/version", headers={"X-Request-ID": "my-id"}).headers["x-request-id"] == "my-id"
    assert fake.post(COMPLETIONS, {"prompt": ""}, headers={"X-Request-ID": "my-id"}).headers["x-request-id"] == "my-id"
    ids = {fake.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert fake.get("/version", headers={"X-Request-ID": "x" * 1000}).headers["x-request-id"] != "x" * 1000


def test_wrong_api_key_is_a_401_and_never_logged(capfd):
    endpoint = Endpoint(fake_llm(), AppOptions(api_key="s3cret-kéy"))
    try:
        assert endpoint.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic x"},
        ):
            for path in ("/v1/models", "/metrics", "/tokenizer_info"):
                response = endpoint.get(path, headers=headers)
                assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer s3cret-kéy".encode()}
        assert endpoint.get("/v1/models", headers=right).status_code == 200
    finally:
        endpoint.close()
    assert "s3cret" not in "".join(capfd.readouterr())


def test_large_body_is_a_413():
    endpoint = Endpoint(fake_llm(), AppOptions(max_body_bytes=1000))

    async def pieces():
        for _ in range(20):
            yield b"x" * 100

    try:
        response = endpoint.post(COMPLETIONS, {"prompt": "x" * 1000})
        assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
        assert endpoint.post(COMPLETIONS, content=pieces(), headers=JSON).status_code == 413
        assert endpoint.completion(prompt="x" * 900)
    finally:
        endpoint.close()


def test_cross_origin_request_gets_no_cors_headers(fake):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    response = fake.wait(fake.client.options(COMPLETIONS, headers=headers))
    assert response.status_code == 405 and not [name for name in response.headers if name.startswith("access-control")]


def test_full_queue_is_a_429_with_retry_after(held):
    endpoint, runner = held  # two seats, two may wait
    busy = [
        endpoint.begin(endpoint.client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 3, "ignore_eos": True}))
        for _ in range(4)
    ]
    wait_until(lambda: endpoint.frontend.open_samples == 4)
    for stream in (False, True):
        response = endpoint.post(COMPLETIONS, {"prompt": "x", "stream": stream})
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert error_of(response)["type"] == "rate_limit_error"
    assert endpoint.get("/health").status_code == 200  # HTTP does not wait for the step that is held
    runner.free.set()
    assert [one.result(10).status_code for one in busy] == [200] * 4
    assert endpoint.completion(prompt="x", max_tokens=1)


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_sequences(held, stream):
    endpoint, runner = held
    gone = {"type": "http.disconnect"}
    body = json.dumps({"prompt": ["x", "y"], "max_tokens": 400, "ignore_eos": True, "stream": stream}).encode()
    sent = []

    async def request():
        import asyncio

        messages = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()
        endpoint.leave = lambda: endpoint.loop.call_soon_threadsafe(left.set)

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return gone

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": headers}
        scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "", "raw_path": b""}
        await endpoint.gate({**scope, "server": ("x", 1), "client": ("y", 2)}, receive, send)

    running = endpoint.begin(request())
    runner.step(5)
    wait_until(lambda: runner.steps == 5)
    assert endpoint.frontend.open_samples == 2
    endpoint.leave()
    running.result(5)
    assert endpoint.frontend.open_samples == 0
    runner.step(1)  # the step that is held ends, then the abort is obeyed
    assert endpoint.idle() and runner.steps <= 7
    endpoint.integrity()
    assert endpoint.gate.in_flight == 0
    assert b"batchinfer_disconnects_total 1.0" in endpoint.frontend.metrics.render_text()
    assert stream == any(b"data: " in message.get("body", b"") for message in sent)


def test_failed_engine_is_a_500_for_every_request(held):
    endpoint, runner = held
    waiting = [
        endpoint.begin(endpoint.client.post(COMPLETIONS, json={"prompt": "x", "ignore_eos": True, "stream": stream}))
        for stream in (False, True)
    ]
    wait_until(lambda: endpoint.frontend.open_samples == 2)
    runner.step(4)
    wait_until(lambda: runner.steps == 4)

    def broken(plan, constraints):
        raise RuntimeError("no memory left")

    runner._runner.launch = broken
    endpoint.frontend.model.parts.engine._recover = _give_up
    runner.free.set()
    whole, streamed = (one.result(10) for one in waiting)
    assert whole.status_code == 500 and error_of(whole)["code"] == "engine_failure"
    assert events_of(streamed.text)[-1]["error"]["code"] == "engine_failure"
    wait_until(lambda: endpoint.frontend.failure is not None)
    health = endpoint.get("/health")
    assert health.status_code == 500 and "no memory left" in health.json()["reason"]
    assert endpoint.post(COMPLETIONS, {"prompt": "x"}).status_code == 500
    endpoint.integrity = lambda: None  # nobody is there to ask


def _give_up(error):
    raise error


def test_failed_step_fails_one_request_only(held):
    endpoint, runner = held
    real = runner._runner.launch

    def picky(plan, constraints):
        if any(seat_prompt(endpoint, seat) == [66] for seat in plan.seats):
            raise ValueError("bad row")
        return real(plan, constraints)

    runner._runner.launch = picky
    runner.free.set()
    assert endpoint.refused(COMPLETIONS, {"prompt": "B"}, 500)["code"] == "engine_failure"
    assert endpoint.completion(prompt="A", max_tokens=2)
    assert endpoint.get("/health").status_code == 200


def seat_prompt(endpoint: Endpoint, seat: int) -> list[int]:
    running = endpoint.frontend.model.parts.engine.scheduler.running
    return running[seat].request.prompt if seat in running else []


def test_prompt_larger_than_the_kv_cache_is_a_400():
    endpoint = Endpoint(fake_llm(kv_cache_tokens=64, max_model_len=1000))
    try:
        for stream in (False, True):
            error = endpoint.refused(COMPLETIONS, {"prompt": "x" * 100, "stream": stream, "max_tokens": 5})
            assert error["code"] == "context_length_exceeded" and "kv_cache_tokens" in error["message"]
        assert endpoint.completion(prompt="x", max_tokens=2)
    finally:
        endpoint.close()


def test_draining_refuses_new_requests_and_ends_streams_with_an_error(held):
    endpoint, runner = held
    body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    open_stream = endpoint.begin(endpoint.client.post(COMPLETIONS, json=body))
    runner.step(3)
    wait_until(lambda: runner.steps == 3)
    endpoint.gate.draining = True
    response = endpoint.post(COMPLETIONS, {"prompt": "x"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert endpoint.get("/health").status_code == 200
    refusal = ApiError(503, "the server is shutting down", code="shutting_down")
    endpoint.loop.call_soon_threadsafe(endpoint.frontend.fail_all, refusal)
    events = events_of(open_stream.result(5).text)
    assert events[-1]["error"]["code"] == "shutting_down" and "choices" in events[0]
    wait_until(lambda: endpoint.gate.in_flight == 0)
    runner.step()
    assert endpoint.idle()
    endpoint.gate.draining = False


def test_bug_is_a_500_with_an_error_body(fake, monkeypatch, capfd):
    monkeypatch.setattr(fake.frontend, "admit", lambda: 1 / 0)
    response = fake.post(COMPLETIONS, {"prompt": "x"})
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_metrics_equal_the_table_in_the_docs(fake):
    fake.completion(prompt="x" * 40, max_tokens=3, ignore_eos=True)
    fake.refused(COMPLETIONS, {"prompt": ""})
    text = fake.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    names = {name.removesuffix("_total") for name in names if not name.endswith("_created")}
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(batchinfer_\w+)`", page, re.MULTILINE))
    assert names == documented
    value = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    assert float(value["batchinfer_generated_tokens_total"]) >= 3
    assert float(value['batchinfer_prompt_tokens_total{source="computed"}']) >= 40
    assert float(value["batchinfer_sequences_running"]) == 0
    assert float(value["batchinfer_time_to_first_token_seconds_count"]) >= 1
    assert float(value['batchinfer_errors_total{status="400"}']) >= 1


def test_openapi_schema_names_error_bodies_of_every_route(fake):
    schema = fake.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert {"4XX", "5XX"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"]


def test_events_of_a_busy_consumer_are_merged():
    first = Event(1, [1, 2], None, None, 5.0)
    both = first.merge_later(Event(1, [3], None, None, 5.0))
    assert both.token_ids == [1, 2, 3] and both.first_token_s == 5.0


def test_concurrent_requests_leave_nothing_behind(fake):
    async def all_of_them() -> list[httpx.Response]:
        import asyncio

        bodies = [{"prompt": f"prompt {i}", "n": 1 + i % 3, "stream": i % 2 == 0, "max_tokens": 20} for i in range(60)]
        return await asyncio.gather(*(fake.client.post(COMPLETIONS, json=body) for body in bodies))

    assert {response.status_code for response in fake.wait(all_of_them())} == {200}
    assert fake.idle()
    fake.integrity()
