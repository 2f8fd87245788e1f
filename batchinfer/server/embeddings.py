"""Embedding requests: pooled hidden states of the model's last layer."""

from __future__ import annotations

import time

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.openai.embedding_response import embedding_response
from batchinfer.openai.parse import parse_request
from batchinfer.openai.request_models import EmbeddingRequest
from batchinfer.pipeline.prompt import Prepared
from batchinfer.pipeline.scoring import Pooled
from batchinfer.request import Finished
from batchinfer.server.errors import ApiError, JsonResponse
from batchinfer.server.frontend import Frontend
from batchinfer.server.respond import check_model, run_for_client


async def respond_with_vectors(frontend: Frontend, receive: Receive, body: EmbeddingRequest) -> Response:
    """Embed the inputs and return the response. Raises ApiError, RowError."""
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def embed() -> Response:
        request = parse_request(body, frontend.model.facts)
        assert request.pooling is not None
        prepared = await frontend.prepare_request(request)
        vectors = await _embed_prompts(frontend, prepared, request.pooling)
        reply = embedding_response(body, vectors, sum(len(prompt.ids) for prompt in prepared), name)
        frontend.metrics.observe_request(time.monotonic() - arrived_s)
        return JsonResponse(reply)

    return await run_for_client(frontend, receive, embed())


async def _embed_prompts(frontend: Frontend, prepared: list[Prepared], pooling: Pooled) -> list[list[float]]:
    generation = frontend.open_generation(prepared, False)
    vectors: dict[int, list[float]] = {}
    try:
        async for events in generation.event_batches():
            ended = ((event.request_id, event.finished) for event in events)
            vectors |= {number: _vector(finished, pooling) for number, finished in ended if finished is not None}
    finally:
        frontend.close_generation(generation)
    return [vectors[prompt.requests[0].request_id] for prompt in prepared]


def _vector(finished: Finished, pooling: Pooled) -> list[float]:
    if finished.error is not None:
        raise ApiError(500, str(finished.error), code="engine_failure")
    rows = finished.request.rows_read()
    assert finished.hidden is not None and rows is not None, "nothing was pooled"
    return pooling.vector(finished.hidden, len(rows))
