"""Endpoints for tests: in this process over ASGI, or as a process with uvicorn."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.llm import LLM
from batchinfer.request import Constraint
from batchinfer.server.app import AppOptions, create_app
from batchinfer.server.frontend import Frontend, ServedModel
from batchinfer.server.metrics import Metrics
from batchinfer.spec import FakeSpec
from batchinfer.text.pieces import BYTE_ALPHABET
from tests.harness import InstantRunner


class Endpoint:
    """Application in this process with its asyncio loop in a thread; calls are synchronous."""

    def __init__(self, llm: LLM, options: AppOptions | None = None, max_waiting: int = 2048, **model) -> None:
        parts = llm.parts()
        names = model.pop("names", ("test-model",))
        self.model = ServedModel(parts, names, **{"chat_template": parts.tokenizer.chat_template, **model})
        self.frontend = Frontend(self.model, Metrics(), max_waiting)
        self.gate = create_app(self.frontend, options)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.wait(self._start())

    async def _start(self) -> None:
        self.frontend.start()
        transport = httpx.ASGITransport(self.gate, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://endpoint", timeout=30)

    def close(self) -> None:
        self.wait(self.client.aclose())
        self.integrity()
        self.frontend.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def begin(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, coroutine):
        return self.begin(coroutine).result(30)

    def get(self, path: str, **more) -> httpx.Response:
        return self.wait(self.client.get(path, **more))

    def post(self, path: str, body=None, **more) -> httpx.Response:
        return self.wait(self.client.post(path, **({"json": body} if body is not None else {}), **more))

    def ok(self, path: str, **body) -> dict:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def completion(self, **body) -> dict:
        return self.ok("/v1/completions", **body)

    def chat(self, **body) -> dict:
        return self.ok("/v1/chat/completions", **body)

    def refused(self, path: str, body, status: int = 400) -> dict:
        """Post a body that must be refused; return the error object after checking its fields."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        return error_of(response)

    def stream(self, path: str, **body) -> list[dict]:
        """Return the events of a stream that must end with [DONE]."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)

    def integrity(self) -> None:
        """Check that no request has left anything in the scheduler."""
        self.frontend.engine.call(lambda engine: engine.scheduler.check_integrity()).result(10)

    def idle(self) -> bool:
        """Return True if the engine holds no request."""
        return (
            self.frontend.engine.call(lambda engine: not engine.has_work).result(10) and not self.frontend.open_samples
        )


def events_of(text: str) -> list[dict]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]


class Held(InstantRunner):
    """Runner that waits before every step until the test releases it."""

    def __init__(self, runner) -> None:
        self._runner = runner
        self._go = threading.Semaphore(0)
        self.free = threading.Event()
        self.steps = 0

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> StepResult:
        while not self.free.is_set() and not self._go.acquire(timeout=0.01):
            pass
        self.steps += 1
        return self._runner.launch(plan, constraints)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._go.release()

    def breaks(self, after: int) -> None:
        """Run `after` steps, then fail every later one."""

        def broken(plan: StepPlan, constraints: object) -> StepResult:
            raise RuntimeError("broken")

        end = time.monotonic() + 10
        self.step(after)
        while self.steps < after:
            assert time.monotonic() < end, "the steps did not run"
            time.sleep(0.005)
        self._runner.launch = broken
        self.free.set()


def fake_llm(answer_tokens=(3, 30), step_s: float = 0.0, **options) -> LLM:
    return LLM("fake", fake=FakeSpec(answer_tokens=answer_tokens, step_s=step_s), **options)


@pytest.fixture(scope="module")
def fake() -> Iterator[Endpoint]:
    """Yield an endpoint of the fake model: answers of up to 30 tokens, a token is a byte."""
    endpoint = Endpoint(fake_llm(max_num_seqs=16, max_model_len=2048))
    yield endpoint
    endpoint.close()


@pytest.fixture
def held() -> Iterator[tuple[Endpoint, Held]]:
    """Yield an endpoint with two seats and long answers, and its runner, which is stepped by the test."""
    llm = fake_llm(answer_tokens=500, max_num_seqs=2, max_model_len=1024)
    engine = llm.parts().engine
    engine._runner = held = Held(engine._runner)
    endpoint = Endpoint(llm, max_waiting=2)
    yield endpoint, held
    held.free.set()
    endpoint.close()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a random Llama whose tokens are bytes, with tokenizer and chat template."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=258, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder)
    rust = RustTokenizer(models.BPE(dict(BYTE_ALPHABET), []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    rust.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if tools %}tools{% endif %}"
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Iterator[Endpoint]:
    """Yield an endpoint of a real model, small and random."""
    endpoint = Endpoint(LLM(tiny_directory, max_num_seqs=8, kv_cache_tokens=4096))
    yield endpoint
    endpoint.close()


HERMES = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }}{{ c.function.arguments.a }}{{ c.id }}</tool_call>{% endfor %}"
    "{{ m.tool_call_id }}\n{% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
)


@pytest.fixture(scope="module")
def hermes(tiny_directory):
    llm = LLM(tiny_directory, chat_template=HERMES, max_num_seqs=4, kv_cache_tokens=2048)
    endpoint = Endpoint(llm, chat_template=HERMES)
    yield endpoint
    endpoint.close()


class Process:
    """`batchinfer serve` as a separate process."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-c", "import sys; from batchinfer.cli.main import process; process()"]
        self.popen = subprocess.Popen(
            [*command, "--log-json", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.log: list[dict] = []

    def url(self) -> str:
        """Wait until the process listens; return its URL."""
        for line in self.popen.stderr:
            self.log.append(json.loads(line))
            if self.log[-1]["message"] == "listening":
                return self.log[-1]["url"]
        raise AssertionError(f"it ended: {self.log}")

    def end(self, timeout: float = 20) -> tuple[int, str, str]:
        """Wait for the end; return exit code, stdout and the rest of stderr."""
        out, err = self.popen.communicate(timeout=timeout)
        return self.popen.returncode, out, err


@pytest.fixture
def processes() -> Iterator[type[Process]]:
    """Yield a function that starts processes; they are killed at the end of the test."""
    started: list[Process] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> Process:
        started.append(Process(*arguments, env=env))
        return started[-1]

    yield start
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
        one.popen.communicate()


def referring_tool(name):
    """Return a tool whose parameters refer into their own schema."""
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/one"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"one": {"enum": [1, 2]}},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}
