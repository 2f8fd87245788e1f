"""Routes /v1/files and /v1/batches: https://platform.openai.com/docs/api-reference/batch.

The catalog stores files and batches; a runner validates and runs batches.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import FileResponse

from batchinfer.batches.catalog import BatchRecord, Catalog, FileRecord, new_id
from batchinfer.errors import StorageError
from batchinfer.server.errors import ApiError, bad_request
from batchinfer.server.upload import receive_upload

MAX_FILE_BYTES = 16 << 30
_WINDOW = re.compile(r"([1-9]\d{0,5})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_PROBLEM = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "file": {"type": "string", "format": "binary"},
                    },
                    "required": ["purpose", "file"],
                }
            }
        },
    }
}

Record = TypeVar("Record", FileRecord, BatchRecord)
Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=100)]
FileLimit = Annotated[int, Query(ge=1, le=10_000)]


class BatchQueue(Protocol):
    """Queue of batches to run."""

    @property
    def endpoints(self) -> Sequence[str]:
        """Return the routes that a batch's lines may name, e.g. /v1/completions."""

    def submit(self, batch_id: str) -> None:
        """Queue a batch that was added to the catalog."""

    def cancel(self, batch_id: str) -> BatchRecord | None:
        """Stop running a batch and return its record; None if it has ended or is about to."""


class NewBatch(BaseModel):
    """Body of POST /v1/batches. completion_window: minutes, hours or days until requests that have not run expire."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None


def make_batch_router(catalog: Catalog, runner: BatchQueue, max_file_bytes: int = MAX_FILE_BYTES) -> APIRouter:
    """Return the routes of files and batches; handlers of the app answer ApiError and validation errors."""
    router = APIRouter(responses={status: _documented(text) for status, text in _STATUSES.items()})
    _add_files(router, catalog, max_file_bytes)
    _add_batches(router, catalog, runner)
    return router


_STATUSES = {400: "the request is wrong", 404: "no such file or batch", 507: "the disk is full"}


def _documented(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _PROBLEM}}}


# -- files --------------------------------------------------------------------------------------------------------


def _add_files(router: APIRouter, catalog: Catalog, max_file_bytes: int) -> None:
    @router.post("/v1/files", openapi_extra=_UPLOAD, responses={413: _documented("the file is too large")})
    async def upload_file(request: Request) -> dict[str, Any]:
        async with _storage_errors_async(), receive_upload(request, catalog.temporary(), max_file_bytes) as upload:
            purpose = upload.fields.get("purpose")
            if purpose != "batch":
                raise bad_request(f"purpose must be 'batch', got {purpose!r}", "purpose")
            # a rename and two small writes
            return file_object(catalog.add_file(upload.path, upload.filename or "", purpose))

    @router.get("/v1/files")
    def list_files(
        purpose: str | None = None, limit: FileLimit = 10_000, order: Order = "desc", after: str | None = None
    ) -> dict[str, Any]:
        records = [record for record in catalog.files() if purpose in (None, record.purpose)]
        chosen, more = paginate(records if order == "desc" else records[::-1], limit, after)
        return list_object([file_object(record) for record in chosen], more)

    @router.get("/v1/files/{file_id}")
    def retrieve_file(file_id: str) -> dict[str, Any]:
        return file_object(_file(catalog, file_id))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse)
    def file_content(file_id: str) -> FileResponse:
        return FileResponse(catalog.content(_file(catalog, file_id).id), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    def delete_file(file_id: str) -> dict[str, Any]:
        record = _file(catalog, file_id)
        for batch in catalog.batches():
            if batch.input_file_id == record.id and not batch.ended:
                message = f"file {record.id} is the input of batch {batch.id}, which is {batch.status}: cancel it first"
                raise ApiError(400, message, param="file_id", code="file_in_use")
        with _storage_errors():
            catalog.delete_file(record.id)
        return {"id": record.id, "object": "file", "deleted": True}


def _file(catalog: Catalog, file_id: str) -> FileRecord:
    record = catalog.file(file_id)
    if record is None:
        raise ApiError(404, f"no such file: {file_id}", param="file_id", code="not_found")
    return record


def file_object(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": None,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


# -- batches ------------------------------------------------------------------------------------------------------


def _add_batches(router: APIRouter, catalog: Catalog, runner: BatchQueue) -> None:
    @router.post("/v1/batches")
    def create_batch(body: NewBatch) -> dict[str, Any]:
        record = _new_record(catalog, runner, body)
        with _storage_errors():
            record = catalog.add_batch(record)
        runner.submit(record.id)
        return batch_object(record)

    @router.get("/v1/batches")
    def list_batches(limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
        chosen, more = paginate(catalog.batches(), limit, after)
        return list_object([batch_object(record) for record in chosen], more)

    @router.get("/v1/batches/{batch_id}")
    def retrieve_batch(batch_id: str) -> dict[str, Any]:
        return batch_object(_batch(catalog, batch_id))

    @router.post("/v1/batches/{batch_id}/cancel")
    def cancel_batch(batch_id: str) -> dict[str, Any]:
        _batch(catalog, batch_id)
        with _storage_errors():
            record = runner.cancel(batch_id)
        if record is None:
            status = _batch(catalog, batch_id).status
            raise ApiError(400, f"batch {batch_id} cannot be cancelled: it is {status}", code="batch_not_cancellable")
        return batch_object(record)


def _batch(catalog: Catalog, batch_id: str) -> BatchRecord:
    record = catalog.batch(batch_id)
    if record is None:
        raise ApiError(404, f"no such batch: {batch_id}", param="batch_id", code="not_found")
    return record


def _new_record(catalog: Catalog, runner: BatchQueue, body: NewBatch) -> BatchRecord:
    """Validate the body and return the record of a new batch. Raises ApiError."""
    if body.endpoint not in runner.endpoints:
        known = ", ".join(runner.endpoints)
        raise bad_request(f"endpoint {body.endpoint!r} is not supported for batches; these are: {known}", "endpoint")
    window = _WINDOW.fullmatch(body.completion_window)
    if window is None:
        message = f"completion_window must be like '24h', '90m' or '7d', got {body.completion_window!r}"
        raise bad_request(message, "completion_window")
    file = catalog.file(body.input_file_id)
    if file is None:
        raise bad_request(f"no such file: {body.input_file_id}", "input_file_id")
    if file.purpose != "batch":
        message = f"file {file.id} has the purpose {file.purpose!r}; a batch needs one uploaded with 'batch'"
        raise bad_request(message, "input_file_id")
    for key in body.metadata or {}:
        if len(key) > 64:
            raise bad_request(f"metadata: the key {key[:64]!r}… is longer than 64 characters", "metadata")
    return BatchRecord(
        id=new_id("batch_"),
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        expires_at=int(time.time()) + int(window[1]) * _SECONDS[window[2]],
        metadata=body.metadata,
    )


def batch_object(record: BatchRecord) -> dict[str, Any]:
    problems = [problem._asdict() for problem in record.problems]
    statuses = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": record.created_at,
        **{f"{status}_at": record.times.get(status) for status in statuses},
        "expires_at": record.expires_at,
        "request_counts": record.counts._asdict(),
        "metadata": record.metadata,
    }


# -- both ---------------------------------------------------------------------------------------------------------


def paginate(records: list[Record], limit: int, after: str | None) -> tuple[list[Record], bool]:
    """Return at most `limit` records after `after`, and True if more follow. Raises ApiError for an unknown `after`."""
    start = 0
    if after is not None:
        start = next((place for place, record in enumerate(records, 1) if record.id == after), 0)
        if not start:
            raise bad_request(f"after: {after!r} is not in this list", "after")
    return records[start : start + limit], len(records) > start + limit


def list_object(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": more}


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Raise errors of the disk as ApiError: 507 if it is full, else 500."""
    try:
        yield
    except (StorageError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        text = "the server's disk is full" if full else "the server cannot write to its disk"
        raise ApiError(507 if full else 500, text, code="disk_full" if full else "storage_error") from error


@asynccontextmanager
async def _storage_errors_async() -> AsyncIterator[None]:
    with _storage_errors():
        yield
