"""Errors as clients see them: OpenAI's or Anthropic's error object, and the HTTP status."""

from __future__ import annotations

import traceback
from typing import Any

from starlette.responses import Response

from batchinfer.errors import DeadlineExceeded, EngineFailure, RowError, TooLong
from batchinfer.log import log
from batchinfer.openai.json_text import dump_json
from batchinfer.openai.parse import MESSAGES, route_field
from batchinfer.openai.sampling_fields import error_param

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MESSAGE_TYPES = {**_TYPES, 413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


class ApiError(Exception):
    """Error response to one request.

    param: the field at fault. code: the error's name for programs. retry_after_s: the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the error object in the format of the route at `path`."""
        if path.startswith(MESSAGES):
            kind = _MESSAGE_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        param = route_field(path, self.param)
        return {"error": {"message": self.message, "type": self.type, "param": param, "code": self.code}}

    def response(self, path: str = "") -> Response:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JsonResponse(self.body(path), self.status, headers)


class JsonResponse(Response):
    """JSON response; NaN and infinities are written as null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)


def as_api_error(error: Exception) -> ApiError:
    """Return an ApiError as it is; log any other exception, which is a bug, with its traceback."""
    if isinstance(error, ApiError):
        return error
    log.error("internal error while handling a request", traceback="".join(traceback.format_exception(error)))
    return internal_error(error)


def internal_error(error: Exception) -> ApiError:
    """Return the error that a client gets for a bug."""
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def from_row_error(error: RowError) -> ApiError:
    """Return the error that a client gets for an error of preparing or running a request."""
    message = str(error)
    if isinstance(error, TooLong):
        return ApiError(400, message, param=error_param(error), code=CONTEXT_LENGTH_EXCEEDED)
    if isinstance(error, EngineFailure):
        return ApiError(500, message, code="engine_failure")
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, code="deadline")
    return ApiError(400, message, param=error_param(error), code=error.kind)
