"""Common course of a generation request: check the model, admit, prepare, run, reply; cancel on disconnect."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.openai.as_chat import ChatLikeRequest
from batchinfer.openai.delta import Delta
from batchinfer.openai.parse import ParsedRequest, parse_request
from batchinfer.openai.request_models import ChatRequest, CompletionRequest
from batchinfer.pipeline.prompt import Prepared
from batchinfer.server.errors import ApiError, JsonResponse
from batchinfer.server.frontend import Frontend
from batchinfer.server.sample_texts import DeltaSource, EmptySamples, SampleTexts
from batchinfer.server.sse import (
    CLIENT_DISCONNECTED,
    ClientDisconnected,
    EventStreamResponse,
    Reply,
    cancel_on_disconnect,
)

GenerationBody = ChatRequest | CompletionRequest | ChatLikeRequest
MakeReply = Callable[[ParsedRequest, list[Prepared], str], Reply]
"""Returns the reply's format. Arguments: request, its prompts, model name for the reply."""


def check_model(frontend: Frontend, name: str | None) -> str:
    """Return the model name for the reply. Raises ApiError if `name` is not served here."""
    names = frontend.model.names
    if name is not None and name not in names:
        message = f"no model {name!r} is served here, only {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name or names[0]


async def respond(frontend: Frontend, receive: Receive, body: GenerationBody, make_reply: MakeReply) -> Response:
    """Generate, and return the response: JSON or server-sent events.

    Raises ApiError, RowError for errors before the first byte of the reply.
    """
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def generate() -> Response:
        request = parse_request(body, frontend.model.facts)
        prepared = await frontend.prepare_request(request)
        reply = make_reply(request, prepared, name)
        # prompt logprobs come with the end of a sample, and a reply shows them first
        live = request.params.prompt_logprobs is None
        samples: DeltaSource
        if request.echo_only:
            samples = EmptySamples(prepared)
        else:
            samples = SampleTexts(frontend, prepared, bool(body.stream) and live, arrived_s)
        if body.stream:
            return await _stream_reply(frontend, reply, samples, live)
        try:
            deltas = await samples.whole_deltas()
        finally:
            samples.close()
        return JsonResponse(reply.whole_body(deltas, samples.usage()))

    return await run_for_client(frontend, receive, generate())


async def run_for_client(frontend: Frontend, receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response of `work`, which is cancelled if the client disconnects."""
    try:
        return await cancel_on_disconnect(receive, work)
    except ClientDisconnected:
        frontend.metrics.count_disconnect()
        return Response(status_code=CLIENT_DISCONNECTED)


async def _stream_reply(frontend: Frontend, reply: Reply, samples: DeltaSource, live: bool) -> Response:
    """Return a streaming response once the first events exist: an error before them still gets its HTTP status."""
    chunks = _stream_chunks(reply, samples, live)
    try:
        first = await anext(chunks, b"")
    except BaseException:
        samples.close()
        raise
    return EventStreamResponse(first, chunks, reply, samples.close, frontend.metrics)


async def _stream_chunks(reply: Reply, samples: DeltaSource, live: bool) -> AsyncGenerator[bytes, None]:
    async for deltas in samples.delta_batches() if live else _whole_batch(samples):
        chunk = reply.stream_events(deltas, samples.usage())
        if chunk:
            yield chunk
    yield reply.end_events(samples.usage())


async def _whole_batch(samples: DeltaSource) -> AsyncIterator[list[Delta]]:
    yield await samples.whole_deltas()
