"""Multipart upload, written to disk as it arrives: at most a megabyte of it is in memory.

Follows RFC 7578. Starlette's own form parser would first keep the whole file in the system's temporary directory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from batchinfer.server.errors import ApiError, bad_request

_WRITE_BYTES = 1 << 20
_FIELD_BYTES = 64 << 10
_NAME_CHARS = 255


@dataclass
class Upload:
    """Fields of a form with one file. filename: as the client named it, shortened, without control characters."""

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size_bytes: int = 0


@asynccontextmanager
async def receive_upload(request: Request, path: Path, max_bytes: int) -> AsyncIterator[Upload]:
    """Write the form's part `file` to `path`, which is deleted afterwards unless the caller moved it.

    Raises ApiError if the form is malformed, has no such part or is larger than `max_bytes`; OSError from the disk.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad_request("files are uploaded as multipart/form-data with the parts purpose and file")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes + _FIELD_BYTES:
        raise _too_large(max_bytes)
    file = await run_in_threadpool(path.open, "wb")
    try:
        form = _Form(Upload(path), max_bytes)
        parser = _make_parser(boundary, form)
        async for data in request.stream():
            _run_parser(lambda data=data: parser.write(data))  # type: ignore[misc]
            if form.pending_bytes >= _WRITE_BYTES:
                await _write_pending(form, file)
        _run_parser(parser.finalize)
        if not form.complete:
            raise bad_request("the form ends early: its last boundary is missing")
        await _write_pending(form, file)
        await run_in_threadpool(file.close)
        if form.upload.filename is None:
            raise bad_request("the form has no part 'file' with a file name", "file")
        yield form.upload
    finally:
        await run_in_threadpool(_discard, file, path)


async def _write_pending(form: _Form, file: BinaryIO) -> None:
    """Write the buffered bytes in a thread, because the disk may block."""
    await run_in_threadpool(file.write, form.pop_pending())


def _discard(file: BinaryIO, path: Path) -> None:
    try:
        file.close()
    finally:
        path.unlink(missing_ok=True)


def _run_parser(step: Callable[[], object]) -> None:
    try:
        step()
    except FormParserError as error:
        raise bad_request(f"the form is malformed: {error}") from None


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the file is larger than {max_bytes} bytes, the limit of this server", param="file", code="file_too_large"
    )


class _Form:
    """Callbacks of the parser: they collect fields, and buffer the file's bytes until they are written."""

    def __init__(self, upload: Upload, max_bytes: int) -> None:
        self.upload = upload
        self.complete = False
        self.pending_bytes = 0
        self._max_bytes = max_bytes
        self._pending: list[bytes] = []
        self._header: list[bytearray] = [bytearray(), bytearray()]
        self._name: str | None = None
        self._value = bytearray()
        self._in_file = False

    def pop_pending(self) -> bytes:
        data, self._pending, self.pending_bytes = b"".join(self._pending), [], 0
        return data

    def on_part_begin(self) -> None:
        self._name, self._in_file = None, False
        self._value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        name, value = (bytes(text) for text in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._in_file = filename is not None and self._name == "file"
        if filename is not None and self._in_file:
            if self.upload.filename is not None:
                raise bad_request("the form has more than one file; upload one at a time", "file")
            text = filename.decode("utf-8", "replace")
            self.upload.filename = "".join(c for c in text if c.isprintable())[-_NAME_CHARS:]

    def on_headers_finished(self) -> None:
        if not self._name:
            raise bad_request("a part of the form has no name")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pending.append(data[start:end])
            self.pending_bytes += end - start
            self.upload.size_bytes += end - start
            if self.upload.size_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            return
        self._value += data[start:end]
        if len(self._value) > _FIELD_BYTES:
            raise bad_request(f"the part {self._name!r} is larger than {_FIELD_BYTES} bytes", self._name)

    def on_part_end(self) -> None:
        if not self._in_file and self._name:
            self.upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.complete = True


def _make_parser(boundary: bytes, form: _Form) -> MultipartParser:
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": form.on_part_end,
                "on_end": form.on_end,
            },
        )
    except FormParserError as error:
        raise bad_request(f"the form's boundary cannot be used: {error}") from None
