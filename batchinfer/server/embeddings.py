"""/v1/embeddings: pooled hidden states of the model's last layer, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import time

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.openai.embedding_response import embeddings
from batchinfer.openai.parse import ParsedRequest, parse_request
from batchinfer.openai.request_models import EmbeddingRequest
from batchinfer.pipeline.prompt import Prepared
from batchinfer.pipeline.scoring import Pooled
from batchinfer.request import Finished
from batchinfer.server.errors import ApiError, JsonResponse
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import answer, check_model


async def respond(frontend: Frontend, receive: Receive, body: EmbeddingRequest) -> Response:
    """Answer a request. Raises ApiError, RowError."""
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def begin() -> Response:
        asked = parse_request(body, frontend.model.facts)
        prepared = await frontend.prepare(await frontend.encode(asked), asked)
        vectors = await _embed(frontend, prepared, asked)
        reply = {**embeddings(body, vectors, sum(len(one.ids) for one in prepared)), "model": name}
        frontend.metrics.request_done(time.monotonic() - arrived_s)
        return JsonResponse(reply)

    return await answer(frontend, receive, begin)


async def _embed(frontend: Frontend, prepared: list[Prepared], asked: ParsedRequest) -> list[list[float]]:
    read = asked.pooling
    assert read is not None
    generation = frontend.open(prepared, False)
    vectors: dict[int, list[float]] = {}
    try:
        async for events in generation.batches():
            ended = ((event.request_id, event.finished) for event in events)
            vectors |= {number: _vector(finished, read) for number, finished in ended if finished is not None}
    finally:
        frontend.close(generation)
    return [vectors[one.requests[0].request_id] for one in prepared]


def _vector(finished: Finished, read: Pooled) -> list[float]:
    if finished.error is not None:
        raise ApiError(500, str(finished.error), code="engine_failure")
    rows = finished.request.rows_read()
    assert finished.hidden is not None and rows is not None, "nothing was pooled"
    return read.vector(finished.hidden, len(rows))
