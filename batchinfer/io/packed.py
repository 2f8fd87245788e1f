"""Decompression of gzip and zstd files, detected by the first bytes, with any number of members and frames."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Literal

import zstandard

from batchinfer.errors import InputError
from batchinfer.io.source import Source

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPED = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))  # skippable frames, without content
_BEGINNINGS = {"gzip": (_GZIP,), "zstd": (_ZSTD, *_SKIPPED)}
# compressed bytes per call, which bounds the output of one call whatever the ratio
_FEED_BYTES = 8 << 10

Kind = Literal["gzip", "zstd"]


def compression_of(source: Source) -> Kind | None:
    """Return the compression of a file, None for none."""
    head = source.read_at(0, 4)
    return "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_BEGINNINGS["zstd"]) else None


def decompress(source: Source, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the decompressed content of a file whose raw bytes are `blocks`.

    Zeros after gzip data are padding, as on tapes; gzip accepts them too (RFC 1952 has members follow one another).
    Raises InputError for damaged or truncated compression, and for other data after it.
    """
    kind = compression_of(source)
    if kind is None:
        yield from blocks
        return
    members = _Members(source.url, kind)
    try:
        for block in blocks:
            for start in range(0, len(block), _FEED_BYTES):
                yield from members.feed(block[start : start + _FEED_BYTES])
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{source.url}: damaged {kind} data: {error}") from error
    members.close()


class _Members:
    """Sequence of decoders: a file may be several compressed files joined."""

    def __init__(self, url: str, kind: Kind) -> None:
        self._url = url
        self._kind = kind
        self._decoder: Any = None
        self._begun = b""  # possibly the first bytes of a member
        self._ended_at = 0  # byte offsets: end of the last member, and end of the data read
        self._read = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._read += len(data)
        while data:
            if self._decoder is None:
                data = self._begin(data)
                continue
            if output := self._decoder.decompress(data):
                yield output
            data = b""
            if self._decoder.eof:
                data, self._decoder = self._decoder.unused_data, None
                self._ended_at = self._read - len(data)

    def close(self) -> None:
        """Check that the last member is complete.

        Raises InputError otherwise, and for data other than padding after it.
        """
        if self._decoder is not None or (self._begun and self._may_begin(self._begun)):
            raise InputError(f"{self._url}: the {self._kind} data ends early: the file is truncated")
        if self._begun:
            raise self._garbage()

    def _begin(self, data: bytes) -> bytes:
        """Start a decoder once the data shows that a member begins; return the data for it."""
        begun = self._begun + data
        if self._kind == "gzip" and self._ended_at:
            begun = begun.lstrip(b"\0")
        if begun and not self._may_begin(begun):
            raise self._garbage()
        if len(begun) < len(_BEGINNINGS[self._kind][0]):
            self._begun = begun
            return b""
        self._begun = b""
        if self._kind == "gzip":
            self._decoder = zlib.decompressobj(wbits=31)
        else:
            self._decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        return begun

    def _may_begin(self, begun: bytes) -> bool:
        return any(begun.startswith(known[: len(begun)]) for known in _BEGINNINGS[self._kind])

    def _garbage(self) -> InputError:
        return InputError(
            f"{self._url}: {self._kind} data ends at byte {self._ended_at}, and other data follows: cut it "
            "off, or restore the file"
        )
