"""`batchinfer serve` as a process: exit codes of commands, signals under load, time limits, sockets, clients."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
import torch

from batchinfer.cli import serve
from batchinfer.cli.main import main
from batchinfer.errors import ModelError

PRINT = "import os, sys; print(os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY'], *sys.argv[1:]); "
ASK = """
import json, os, urllib.request
def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    url = os.environ["OPENAI_BASE_URL"] + path
    return json.load(urllib.request.urlopen(urllib.request.Request(url, data, headers)))
"""


def test_a_command_gets_the_endpoint_and_its_exit_code_counts(processes):
    code = PRINT + ASK + "print(ask('/models')['data'][0]['id']); sys.exit(7)"
    arguments = ["--served-model-name", "my/model", "--api-key", "secret"]
    serve = processes(
        "fake", *arguments, "--", sys.executable, "-c", code, "{base_url}/x", "m={model}", "{port}", "{other}"
    )
    exit_code, out, err = serve.end()
    assert exit_code == 7, err
    base, key, url, model, port, other = out.splitlines()[0].split()
    assert base.startswith("http://127.0.0.1:") and base.endswith("/v1")
    assert (key, url, model, other) == ("secret", base + "/x", "m=my/model", "{other}")
    assert base == f"http://127.0.0.1:{port}/v1"
    assert out.splitlines()[1] == "my/model"
    assert "secret" not in err


def test_missing_command_is_exit_code_127(processes):
    exit_code, _, err = processes("fake", "--", "/no/such/command").end()
    assert exit_code == 127 and "/no/such/command" in err


def test_command_ended_by_a_signal_is_128_plus_its_number(processes):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert processes("fake", "--", sys.executable, "-c", code).end()[0] == 128 + 9


def test_sigterm_is_passed_to_the_command(processes):
    serve = processes("fake", "--", sys.executable, "-c", "import time; time.sleep(60)")
    serve.url()
    time.sleep(0.3)
    begun = time.monotonic()
    serve.popen.send_signal(signal.SIGTERM)
    assert serve.end()[0] == 128 + 15
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("option", ["--idle-timeout", "--max-lifetime"])
def test_endpoint_stops_at_its_time_limits(processes, option):
    serve = processes("fake", "--port", "0", option, "0.5")
    url = serve.url()
    assert urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    assert serve.end(10)[0] == 0


def stream(url: str, max_tokens: int, results: list) -> None:
    body = {"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=30) as client, client.stream("POST", f"{url}/v1/completions", json=body) as response:
        results.append((response.status_code, "".join(response.iter_text())))


def test_sigterm_under_load_drains_within_the_grace_period(processes):
    """Short streams finish, new requests are refused, long ones end with an error event; exit within the grace."""
    serve = processes("fake", "--port", "0", "--set", "fake.step_s=0.02", "--set", "fake.answer_tokens=9999")
    url = serve.url()
    short, long = [], []
    threads = [threading.Thread(target=stream, args=(url, 120, short)) for _ in range(4)]
    threads += [threading.Thread(target=stream, args=(url, 5000, long)) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(url, "batchinfer_sequences_running 8.0")
    begun = time.monotonic()
    serve.popen.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    exit_code = serve.end(12)[0]
    assert exit_code == 0 and time.monotonic() - begun < 9.5
    for thread in threads:
        thread.join()
    assert len(short) == len(long) == 4
    for status, text in short:
        assert status == 200 and '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
    for status, text in long:
        assert status == 200 and "shutting_down" in text and text.endswith("data: [DONE]\n\n")


def test_second_signal_exits_at_once(processes):
    serve = processes("fake", "--port", "0", "--set", "fake.step_s=0.02", "--set", "fake.answer_tokens=9999")
    url = serve.url()
    results: list = []

    def cut_off() -> None:
        with pytest.raises(httpx.HTTPError):
            stream(url, 5000, results)

    thread = threading.Thread(target=cut_off)
    thread.start()
    wait_for(url, "batchinfer_sequences_running 1.0")
    serve.popen.send_signal(signal.SIGINT)
    time.sleep(0.2)
    serve.popen.send_signal(signal.SIGINT)
    assert serve.end(3)[0] == 130
    thread.join()


def test_a_real_connection_that_closes_frees_its_sequences(processes):
    serve = processes("fake", "--port", "0", "--set", "fake.step_s=0.01", "--set", "fake.answer_tokens=9999")
    url = serve.url()
    host, port = url.removeprefix("http://").split(":")
    for streaming in (True, False):
        body = json.dumps({"prompt": "x", "max_tokens": 5000, "ignore_eos": True, "stream": streaming}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_for(url, "batchinfer_sequences_running 1.0")
        wait_for(url, "batchinfer_sequences_running 0.0")
    wait_for(url, "batchinfer_disconnects_total 2.0")
    assert float(metric(url, "batchinfer_generated_tokens_total")) < 1000


def metric(url: str, name: str) -> str:
    text = httpx.get(f"{url}/metrics").text
    return next(line.split()[1] for line in text.splitlines() if line.startswith(name))


def wait_for(url: str, line: str) -> None:
    end = time.monotonic() + 5
    while line not in httpx.get(f"{url}/metrics").text.splitlines():
        assert time.monotonic() < end, httpx.get(f"{url}/metrics").text
        time.sleep(0.02)


def test_openai_client_uses_every_route(processes):
    openai = pytest.importorskip("openai")
    serve = processes("fake", "--port", "0", "--api-key", "k", "--set", "fake.answer_tokens=12")
    base = serve.url() + "/v1"
    hi = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=base, api_key="k") as client:
        (model,) = client.models.list()
        chat = client.chat.completions.create(model=model.id, messages=hi, temperature=0, logprobs=True, top_logprobs=1)
        assert chat.choices[0].message.content and chat.usage.completion_tokens == 12
        assert len(chat.choices[0].logprobs.content) == 12
        chunks = list(
            client.chat.completions.create(
                model=model.id, messages=hi, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == chat.choices[0].message.content and chunks[-1].usage.completion_tokens == 12
        completion = client.completions.create(model=model.id, prompt=["a", "b"], max_tokens=3, logprobs=1)
        assert len(completion.choices) == 2 and len(completion.choices[0].logprobs.tokens) == 3
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model.id, prompt="x", logprobs=99)
        assert caught.value.param == "logprobs"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
    with openai.OpenAI(base_url=base, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()

    async def in_asyncio() -> str:
        async with openai.AsyncOpenAI(base_url=base, api_key="k") as client:
            opened = await client.chat.completions.create(model=model.id, messages=hi, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in opened])

    assert asyncio.run(in_asyncio()) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fake", "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["fake", "--set", "output.path=x"], "with a model only"),
        (["fake", "--api-key", ""], "--api-key is empty"),
        (["fake", "--port", "99999"], "--port"),
    ],
)
def test_wrong_option_is_a_usage_error(arguments, said, capsys):
    assert main(["serve", *arguments]) == 64
    assert said in capsys.readouterr().err


def test_taken_port_is_a_usage_error(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "fake", "--port", str(port)]) == 64
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_loading_leaves_no_openmp_workers():
    """Beside the engine thread's own they would be more than the cores, and libgomp then sleeps at every barrier."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("threads are counted in /proc")
    threads = torch.get_num_threads()

    def load():
        torch.set_num_threads(2)
        torch.ones(1 << 22).sin()
        return len(list(tasks.iterdir()))

    try:
        serve._in_thread(load)  # torch keeps one thread of its own from here on
        time.sleep(0.5)
        before = len(list(tasks.iterdir()))
        assert serve._in_thread(load) >= before + 2  # the thread itself, and a worker
        give_up = time.monotonic() + 10
        while len(list(tasks.iterdir())) > before:
            assert time.monotonic() < give_up, "workers are left"
            time.sleep(0.01)
    finally:
        torch.set_num_threads(threads)


def test_errors_of_loading_are_raised():
    def load():
        raise ModelError("no weights")

    with pytest.raises(ModelError, match="no weights"):
        serve._in_thread(load)
