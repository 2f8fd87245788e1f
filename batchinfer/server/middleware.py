"""Middleware around every request: request id, API key, body size limit, draining, and request counts."""

from __future__ import annotations

import hmac
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchinfer.server.errors import ApiError, as_api_error
from batchinfer.server.metrics import Metrics

REQUEST_ID = "x-request-id"
_WITHOUT_KEY = frozenset({"/health"})  # probes have no key
_MONITORING = frozenset({"/health", "/metrics", "/version"})  # answered while draining; no activity
_PLAIN_ID = re.compile(r"[\x21-\x7e]{1,200}")
_DRAIN_RETRY_S = 5


class GateMiddleware:
    """Middleware around the whole application.

    draining: refuse new requests with 503. in_flight: requests being answered. last_used_s: when a request last began
    or ended, on the clock of time.monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        api_key: str | None,
        max_body_bytes: int,
        large_paths: tuple[str, ...] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes = max_body_bytes
        self._large_paths = large_paths
        self.draining = False
        self.in_flight = 0
        self.last_used_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send_with_id = _SendWithRequestId(send, headers.get(REQUEST_ID, ""), self._metrics)
        counts = scope["path"] not in _MONITORING
        self.in_flight += counts
        if counts:
            self.last_used_s = time.monotonic()
        try:
            self._check(scope, headers)
            if not scope["path"].startswith(self._large_paths or ("\0",)):
                receive = await self._read_body(receive, headers)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            api_error = as_api_error(error)
            if not send_with_id.started:
                await api_error.response(scope["path"])(scope, receive, send_with_id)
        finally:
            self.in_flight -= counts
            if counts:
                self.last_used_s = time.monotonic()

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        key = _client_key(headers).encode("latin-1", "replace")
        if self._key is not None and path not in _WITHOUT_KEY and not hmac.compare_digest(key, self._key):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if self.draining and path not in _MONITORING:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=_DRAIN_RETRY_S)

    async def _read_body(self, receive: Receive, headers: Headers) -> Receive:
        """Return a `receive` that delivers the whole body as one message. Raises ApiError if it exceeds the limit."""
        limit = self._max_body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        if not length and "transfer-encoding" not in headers:
            return receive
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return _ReplayReceive(message, receive)
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                return _ReplayReceive({"type": "http.request", "body": b"".join(chunks), "more_body": False}, receive)


class _ReplayReceive:
    """ASGI `receive` that delivers one message read ahead, then the rest."""

    def __init__(self, message: Message, receive: Receive) -> None:
        self._message: Message | None = message
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


class _SendWithRequestId:
    """ASGI `send` that adds the X-Request-ID header and counts the response's status."""

    def __init__(self, send: Send, request_id: str, metrics: Metrics) -> None:
        self._send = send
        self._metrics = metrics
        self._id = request_id if _PLAIN_ID.fullmatch(request_id) else secrets.token_hex(16)
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            MutableHeaders(raw=message["headers"])[REQUEST_ID] = self._id
            self._metrics.count_response(message["status"])
        await self._send(message)


def _client_key(headers: Headers) -> str:
    """Return the API key: a Bearer token as OpenAI's clients send it, or Anthropic's X-API-Key."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
