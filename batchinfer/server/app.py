"""The ASGI application: all routes, error handlers and the middleware around them."""

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
from batchinfer.openai.request_models import ErrorBody, validation_error
from batchinfer.server.errors import ApiError, JsonResponse, from_row_error, internal_error
from batchinfer.server.frontend import Frontend
from batchinfer.server.generation_routes import make_generation_router
from batchinfer.server.middleware import GateMiddleware
from batchinfer.server.respond import check_model
from batchinfer.server.tokenize_routes import make_tokenize_router

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorBody, "description": "What is wrong with the server"},
}


@dataclass(frozen=True, slots=True)
class AppOptions:
    """Options of the application.

    api_key: None accepts every client. routers: further routes. large_paths: path prefixes without a body size limit.
    on_start: called when the engine has started.
    """

    api_key: str | None = None
    max_body_bytes: int = 32 << 20
    routers: Sequence[APIRouter] = field(default=())
    large_paths: tuple[str, ...] = ()
    on_start: Callable[[], None] = lambda: None


def create_app(frontend: Frontend, options: AppOptions | None = None) -> GateMiddleware:
    """Return the ASGI application. Its lifespan starts and stops the engine thread."""
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
        docs_url=None,  # its pages load scripts from other sites
        redoc_url=None,
        responses=_ERRORS,
        exception_handlers={
            ApiError: _api_error,
            RowError: _row_error,
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
            Exception: _internal_error,
        },
    )
    for router in (
        _make_state_router(frontend),
        make_generation_router(frontend),
        make_tokenize_router(frontend),
        *options.routers,
    ):
        app.include_router(router)
    return GateMiddleware(app, frontend.metrics, options.api_key, options.max_body_bytes, options.large_paths)


def _make_state_router(frontend: Frontend) -> APIRouter:
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
        return Response(frontend.metrics.render_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [card(name) for name in frontend.model.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JsonResponse(card(check_model(frontend, name)))

    return router


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _row_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RowError)
    return from_row_error(error).response(request.url.path)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Answer a bug; Starlette raises the exception again, and the middleware logs it."""
    return internal_error(error).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an error of the router: unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response(request.url.path)
    response.headers.update(error.headers or {})
    return response


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_row_error(validation_error(error.errors())).response(request.url.path)
