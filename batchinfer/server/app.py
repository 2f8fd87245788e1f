"""All routes, put together. What is served is decided by the caller: see `create_app`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from batchinfer import __version__
from batchinfer.errors import RowError
from batchinfer.openai.messages_request import CountRequest, MessagesRequest
from batchinfer.openai.request_models import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ErrorBody,
    validation_error,
)
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.server import chat, completions, embeddings, messages, responses, tokenize_routes
from batchinfer.server.errors import ApiError, JsonResponse, internal_error, of_row
from batchinfer.server.frontend import Frontend
from batchinfer.server.middleware import Gate
from batchinfer.server.respond import check_model, respond

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorBody, "description": "What is wrong with the server"},
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The answer"}}


@dataclass(frozen=True, slots=True)
class AppOptions:
    """api_key None lets everybody in. `routers` are further routes; bodies of `large_paths` have no limit of size.

    `on_start` runs when the engine has started.
    """

    api_key: str | None = None
    max_body_bytes: int = 32 << 20
    routers: Sequence[APIRouter] = field(default=())
    large_paths: tuple[str, ...] = ()
    on_start: Callable[[], None] = lambda: None


def create_app(frontend: Frontend, options: AppOptions | None = None) -> Gate:
    """The application, as uvicorn or a test calls it. Its lifespan starts and stops the engine thread."""
    options = options or AppOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        frontend.start()
        options.on_start()
        try:
            yield
        finally:
            frontend.stop()

    app = FastAPI(
        title="batchinfer",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # pages of other people's scripts
        redoc_url=None,
        responses=_ERRORS,
        exception_handlers={
            ApiError: _api_error,
            RowError: _row_error,
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
            Exception: _bug,
        },
    )
    for router in (
        _state_routes(frontend),
        _answer_routes(frontend),
        tokenize_routes.routes(frontend),
        *options.routers,
    ):
        app.include_router(router)
    return Gate(app, frontend.metrics, options.api_key, options.max_body_bytes, options.large_paths)


def _state_routes(frontend: Frontend) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "batchinfer",
            "root": frontend.model.names[0],
            "parent": None,
            "max_model_len": frontend.model.parts.limits.context,
        }

    @router.get("/health")
    async def health() -> Response:
        if frontend.failure is not None:
            return JsonResponse({"status": "failed", "reason": frontend.failure}, 500)
        return JsonResponse({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(frontend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [card(name) for name in frontend.model.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JsonResponse(card(check_model(frontend, name)))

    return router


def _answer_routes(frontend: Frontend) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/completions", responses=_STREAM)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        return await respond(frontend, request.receive, body, lambda name: completions.prepare(frontend, body, name))

    @router.post("/chat/completions", responses=_STREAM)
    async def chat_completion(body: ChatRequest, request: Request) -> Response:
        return await respond(frontend, request.receive, body, lambda name: chat.prepare(frontend, body, name))

    @router.post("/responses", responses=_STREAM)
    async def response(body: ResponseRequest, request: Request) -> Response:
        return await respond(frontend, request.receive, body, lambda name: responses.prepare(frontend, body, name))

    @router.post("/messages", responses=_STREAM)
    async def message(body: MessagesRequest, request: Request) -> Response:
        return await respond(frontend, request.receive, body, lambda name: messages.prepare(frontend, body, name))

    @router.post("/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        return JsonResponse(await messages.count(frontend, body))

    @router.post("/embeddings")
    async def embedding(body: EmbeddingRequest, request: Request) -> Response:
        return await embeddings.respond(frontend, request.receive, body)

    return router


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _row_error(request: Request, error: Exception) -> Response:
    """Of what a body asks for."""
    assert isinstance(error, RowError)
    return of_row(error).response(request.url.path)


async def _bug(request: Request, error: Exception) -> Response:
    """The gate logs it: it is raised again."""
    return internal_error(error).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: no such path, another method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = ApiError(error.status_code, message).response(request.url.path)
    answer.headers.update(error.headers or {})
    return answer


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_row(validation_error(error.errors())).response(request.url.path)
