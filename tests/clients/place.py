"""Environment of the checks: the server that they start and the clients' virtual environments."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

MODEL = "smollm2"
KEY = "sk-local-check"


class Failed(Exception):
    """A check failed; the message says why."""


@dataclass(frozen=True)
class Place:
    """Settings of a run. main, aiperf: virtual environments. model: a directory that transformers can load."""

    root: Path
    main: Path
    aiperf: Path
    model: Path
    work: Path
    port: int
    samples: int
    minutes: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, name: str, *command: object, timeout_s: float = 1800, **env: str) -> str:
        """Run a client to its end and return its output, which is also written to `work`. Raises Failed."""
        code, said = self.ended(name, *command, timeout_s=timeout_s, **env)
        if code:
            raise Failed(f"exit code {code}; see {self.work / f'{name}.log'}\n{said[-1500:]}")
        return said

    def ended(self, name: str, *command: object, timeout_s: float = 1800, **env: str) -> tuple[int, str]:
        """Run a client to its end; return exit code and output. env: overrides the environment, "" unsets a name."""
        log = self.work / f"{name}.log"
        values = {
            **os.environ,
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "huggingface"),
            "COLUMNS": "160",
            "NO_COLOR": "1",
            **env,
        }
        values = {name: value for name, value in values.items() if value}
        words = [str(word) for word in command]
        with log.open("w") as out:
            out.write(f"$ {' '.join(words)}\n")
            out.flush()
            try:
                done = subprocess.run(
                    words, stdout=out, stderr=subprocess.STDOUT, env=values, cwd=self.work, timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                raise Failed(f"did not end within {timeout_s:.0f} s; see {log}") from None
        return done.returncode, log.read_text(errors="replace")

    def get(self, path: str) -> object:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(place: Place, name: str, model: Path, *options: object, module: str | None = None):
    """Start `batchinfer serve` and yield the healthy process; kill it if it outlives the block."""
    log = place.work / f"{name}.log"
    start = ["-m", module] if module else ["-c", "from batchinfer.cli.main import process; process()"]
    command = [sys.executable, *start, "serve", str(model), "--port", str(place.port)]
    command += ["--served-model-name", MODEL, "--data-dir", str(place.work / f"{name}-files"), *map(str, options)]
    with log.open("w") as out:
        # the key is in the environment, as README advises
        env = {**os.environ, "BATCHINFER_API_KEY": KEY}
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=place.root, env=env)
    try:
        _wait_healthy(place, server, log)
        yield server
        if server.returncode is None and server.poll() is not None:
            raise Failed(f"the server died with {server.returncode}:\n{log.read_text()[-3000:]}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _wait_healthy(place: Place, server: subprocess.Popen, log: Path, timeout_s: float = 120) -> None:
    give_up = time.monotonic() + timeout_s
    while True:
        if server.poll() is not None or time.monotonic() > give_up:
            raise Failed(f"the server did not start:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            place.get("/health")
            return
        time.sleep(0.2)


@contextlib.contextmanager
def serving(place: Place, model: Path):
    """Serve for the duration of the block. Raises Failed if the server does not exit cleanly."""
    with started(place, "server", model) as server:
        yield
        server.terminate()
        code = server.wait(30)
        if code != 0:
            raise Failed(f"the server ended with {code} on SIGTERM; see {place.work / 'server.log'}")
