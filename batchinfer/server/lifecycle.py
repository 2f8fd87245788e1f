"""Lifetime of an endpoint: listening, signals, time limits, the command it is started for, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import uvicorn

from batchinfer.errors import EXIT_OK, UsageError
from batchinfer.log import log
from batchinfer.server.errors import ApiError
from batchinfer.server.frontend import Frontend
from batchinfer.server.middleware import GateMiddleware

GRACE_S = 8.0
_LAST_EVENT_S = 1.0  # of the grace period: time for open streams to send their error event
_POLL_S = 0.05
_KEEP_ALIVE_S = 75  # longer than clients pause between requests: a closed connection is an error to them
_EXIT_NOT_FOUND = 127


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """Time limits of an endpoint, in seconds; None means none. idle_s: time without a request in flight."""

    lifetime_s: float | None = None
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """Command to run against the endpoint. arguments: may hold {base_url}, {model} and {port}."""

    arguments: Sequence[str]
    model: str
    api_key: str | None
    environment: Mapping[str, str]


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free port. Raises UsageError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class Background(Protocol):
    """Background work: the endpoint is not idle while it is busy, and closes it on shutdown."""

    @property
    def busy(self) -> bool: ...

    def close(self, grace_s: float) -> None: ...


class Endpoint:
    """Endpoint that serves an application until a signal, a time limit or its command ends it, then drains it."""

    def __init__(
        self,
        gate: GateMiddleware,
        frontend: Frontend,
        sock: socket.socket,
        limits: ServeLimits,
        background: Background | None = None,
    ) -> None:
        self._gate = gate
        self._background = background
        self._frontend = frontend
        self._socket = sock
        self._limits = limits
        self._signal: asyncio.Event = asyncio.Event()
        self._signals = 0
        self._child: asyncio.subprocess.Process | None = None
        config = uvicorn.Config(
            gate,
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)

    @property
    def url(self) -> str:
        """Return the base URL for clients on this machine, without a path."""
        host, port = self._local_address()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _local_address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port

    def serve(self, command: Command | None = None) -> int:
        """Serve until the end; return the exit code, the command's if there is one."""
        # uvloop if installed: it writes a step's tokens to all streams at once. asyncio releases the GIL for each
        # stream and takes it again before the waiting engine thread wakes up
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            return runner.run(self._serve(command))

    async def _serve(self, command: Command | None) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        started_s = time.monotonic()
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        try:
            await self._wait_until_healthy(serving)
            log.info("listening", url=self.url)
            if command is None:
                await self._wait_until_over(started_s)
                code = EXIT_OK
            else:
                code = await self._run_command(command, started_s)
            await self._drain()
        finally:
            self._server.should_exit = True
            await serving
        return code

    async def _wait_until_healthy(self, serving: asyncio.Future[None]) -> None:
        while not self._server.started:
            if serving.done():
                await serving
                raise UsageError("the server did not start")
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*self._local_address())
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        if b" 200 " not in status:
            raise UsageError(f"the server is not healthy: {status.decode(errors='replace').strip()}")

    # -- reasons to end -------------------------------------------------------------------------------------------

    async def _wait_until_over(self, started_s: float) -> None:
        """Wait for a signal, the end of the lifetime, or too long without a request."""
        limits = self._limits
        while not self._signal.is_set():
            now = time.monotonic()
            if limits.lifetime_s is not None and now - started_s >= limits.lifetime_s:
                log.info("maximum lifetime reached", seconds=limits.lifetime_s)
                return
            busy = self._gate.in_flight or (self._background is not None and self._background.busy)
            idle_s = 0.0 if busy else now - self._gate.last_used_s
            if limits.idle_s is not None and idle_s >= limits.idle_s:
                log.info("idle timeout reached", seconds=limits.idle_s)
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._signal.wait(), self._nap_s(now - started_s, idle_s))

    def _nap_s(self, age_s: float, idle_s: float) -> float | None:
        left = [
            limit - used for limit, used in ((self._limits.lifetime_s, age_s), (self._limits.idle_s, idle_s)) if limit
        ]
        return max(_POLL_S, min(left)) if left else None

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)
        log.info("stopping", signal=signal.Signals(number).name)
        self._signal.set()

    async def _run_command(self, command: Command, started_s: float) -> int:
        """Run the command until it or the endpoint ends; return its exit code."""
        arguments = [_fill(argument, self._values(command)) for argument in command.arguments]
        environment = {
            **command.environment,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": command.api_key or "none",
        }
        try:
            self._child = child = await asyncio.create_subprocess_exec(*arguments, env=environment)
        except OSError as error:
            log.error(f"{arguments[0]}: {error.strerror}")
            return _EXIT_NOT_FOUND
        ended = asyncio.ensure_future(child.wait())
        over = asyncio.ensure_future(self._wait_until_over(started_s))
        await asyncio.wait((ended, over), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if not ended.done():
            await self._end_child(child, ended)
        code = ended.result()
        return 128 - code if code < 0 else code

    async def _end_child(self, child: asyncio.subprocess.Process, ended: asyncio.Future[int]) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        await asyncio.wait((ended,), timeout=GRACE_S / 2)
        if not ended.done():
            child.kill()
            await ended

    def _values(self, command: Command) -> dict[str, str]:
        port = str(self._socket.getsockname()[1])
        return {"{base_url}": f"{self.url}/v1", "{model}": command.model, "{port}": port}

    # -- shutdown --------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Refuse new requests, wait for requests in flight, and fail what is left at the end of the grace period."""
        self._gate.draining = True
        end_s = time.monotonic() + GRACE_S
        saving = None
        if self._background is not None:
            saving = asyncio.ensure_future(asyncio.to_thread(self._background.close, GRACE_S))
        if not await self._wait_until_quiet(end_s - _LAST_EVENT_S):
            log.warning("requests were cut off", number=self._gate.in_flight)
            self._frontend.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
            await self._wait_until_quiet(end_s)
        if saving is not None:
            await saving

    async def _wait_until_quiet(self, end_s: float) -> bool:
        """Wait until no request is in flight; return False if some are at `end_s`."""
        while self._gate.in_flight:
            if time.monotonic() >= end_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True


def _fill(argument: str, values: Mapping[str, str]) -> str:
    """Replace these names only: other braces belong to the command."""
    for name, value in values.items():
        argument = argument.replace(name, value)
    return argument


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: `Endpoint` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
