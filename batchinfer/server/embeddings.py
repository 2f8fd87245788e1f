"""/v1/embeddings: pooled hidden states of the model's last layer, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import base64
import struct
import time
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from batchinfer.request import Finished, Pooling
from batchinfer.scoring import Pooled
from batchinfer.server.errors import ApiError, JsonResponse, bad_request
from batchinfer.server.frontend import Frontend
from batchinfer.server.replies import answer, check_model
from batchinfer.server.schemas import EmbeddingRequest

DEFAULT_POOLING: Pooling = "mean"


async def respond(frontend: Frontend, receive: Receive, body: EmbeddingRequest) -> Response:
    """Answer a request. Raises ApiError."""
    arrived_s = time.monotonic()
    name = check_model(frontend, body.model)
    frontend.admit()

    async def begin() -> Response:
        ids = await frontend.in_pool(lambda: _encode(frontend, body.input))
        vectors = await _embed(frontend, ids, Pooled(body.pooling or DEFAULT_POOLING, body.normalize is not False))
        size = len(vectors[0])
        if body.dimensions not in (None, size):
            raise bad_request(f"dimensions is not supported: this model's embeddings have {size}", "dimensions")
        packed = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if packed else vector}
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(map(len, ids))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        frontend.metrics.request_done(time.monotonic() - arrived_s)
        return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})

    return await answer(frontend, receive, begin)


def _encode(frontend: Frontend, given: Any) -> list[list[int]]:
    inputs: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not inputs or not all(inputs):
        raise bad_request("input is empty", "input")
    if isinstance(inputs[0], str):
        return frontend.encode(inputs, True)
    ids: list[list[int]] = inputs
    return ids


async def _embed(frontend: Frontend, ids: list[list[int]], read: Pooled) -> list[list[float]]:
    prepared = await frontend.prepare(ids, frontend.model.parts.defaults, read)
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


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
