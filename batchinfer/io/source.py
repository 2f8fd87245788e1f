"""Random access to input files on any filesystem, and detection of changes since the plan."""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import pyarrow as pa

from batchinfer.errors import InputError, InputMissing
from batchinfer.io.filesystem import Retry, connect, is_file_url, local_path, protocol_of, translate
from batchinfer.io.trees import LocalTree, RemoteTree, Tree, refuse_stream
from batchinfer.spec import StorageSpec

BLOCK_BYTES = 1 << 20
_SEQUENTIAL_BYTES = 4 << 20
_PIECE_BYTES = 256 << 10
_CACHED_BLOCKS = 32
_ETAGS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "LastModified", "last_modified", "mtime", "created")


WHOLE, SAMPLED = "sha256:", "sampled:"  # prefixes of a local file's content identifier
_WHOLE_BYTES = 64 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20
_PARQUET_END = b"PAR1"


class Stat(NamedTuple):
    """Version of a file.

    `mark` is cheap to look up and changes whenever the file may have changed: inode and times of a local file, else the
    store's ETag. `content` is equal for equal files only, see `Source.content`.
    """

    size: int
    mark: str
    content: str = ""


class Source(ABC):
    """One file. Close it; a local file is held open. Raises InputMissing, AccessDenied, StorageError.

    `opened` is its version when it was opened, without `content`. `local`: content, not mark, identifies the file.
    """

    url: str
    opened: Stat
    local: bool

    @abstractmethod
    def stat(self) -> Stat:
        """Return the current version."""

    @abstractmethod
    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes: fewer only at the end of the file."""

    @abstractmethod
    def arrow(self) -> pa.NativeFile:
        """Return a file for pyarrow's readers."""

    @abstractmethod
    def close(self) -> None:
        """Release the file; nothing can be read afterwards."""

    @abstractmethod
    def content(self, like: str = "") -> str:
        """Return an identifier of the file's current content, computed the same way as `like`, an earlier result.

        For a local file it is the hash of all its bytes or, beyond 64 MB, of 64 samples of 1 MB and a Parquet file's
        footer. For other files it is the store's ETag.
        """

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the content from `offset` to the end: fetched a few MB at a time, yielded in smaller pieces."""
        while fetched := self.read_at(offset, _SEQUENTIAL_BYTES):
            for start in range(0, len(fetched), _PIECE_BYTES):
                yield fetched[start : start + _PIECE_BYTES]
            offset += len(fetched)

    def same(self, planned: Stat, now: Stat | None = None) -> bool:
        """Return True if the file is, or `now` was, the planned version: by its mark, else by its content."""
        now = now or self.stat()
        if (now.size, now.mark) == (planned.size, planned.mark):
            return True
        if not self.local or not planned.content or now.size != planned.size:
            return False
        return self.content(planned.content) == planned.content

    def check(self, planned: Stat, when: str, now: Stat | None = None) -> None:
        """Check that the file is, or `now` was, the planned version. Raises InputError otherwise."""
        now = now or self.stat()
        if not self.same(planned, now):
            sizes = f"{planned.size} bytes then, {now.size} now" if now.size != planned.size else "to other content"
            raise InputError(f"{self.url}: {when} ({sizes}): restore it, or start with another output.path")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalSource(Source):
    """A local file, held open."""

    local = True

    def __init__(self, url: str, path: Path) -> None:
        self.url = url
        self._path = path
        self._descriptor = -1
        self.opened = self.stat()
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise translate(error, url) from error

    def stat(self) -> Stat:
        # by path, not by descriptor: a replaced file has changed too
        try:
            stat = self._path.stat()
        except OSError as error:
            raise translate(error, self.url) from error
        if not S_ISREG(stat.st_mode):
            raise refuse_stream(self.url)
        # ctime cannot be set back; mtime can, as by copies that preserve it
        return Stat(stat.st_size, f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_ctime_ns}")

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise translate(error, self.url) from error

    def content(self, like: str = "") -> str:
        with LocalSource(self.url, self._path) as now:  # opened by name, as in `stat`
            if like.startswith(SAMPLED) or (not like and now.opened.size > _WHOLE_BYTES):
                return SAMPLED + hash_of(_samples(now))
            return WHOLE + hash_of(now.blocks())

    def arrow(self) -> pa.NativeFile:
        return pa.OSFile(os.fsencode(self._path), "rb")  # as bytes, which need not be UTF-8

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hash_of(pieces: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def _samples(source: Source) -> Iterator[bytes]:
    """Yield evenly spaced samples, including the first and last bytes.

    A Parquet footer is included, because it holds all sizes and statistics.
    """
    size = source.opened.size
    last = max(size - _SAMPLE_BYTES, 0)
    yield size.to_bytes(8, "little")
    for offset in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
        yield source.read_at(offset, _SAMPLE_BYTES)
    end = source.read_at(size - 8, 8)
    if end.endswith(_PARQUET_END):
        yield from source.blocks(max(size - 8 - int.from_bytes(end[:4], "little"), 0))


class RemoteSource(Source):
    """A remote file: every read is one range request with its own retries; nothing stays open between them."""

    local = False

    def __init__(self, url: str, filesystem: Any, retry: Retry) -> None:
        self.url = url
        self._filesystem = filesystem
        self._retry = retry
        self._path = filesystem._strip_protocol(url)
        self.opened = self.stat()

    def stat(self) -> Stat:
        info = self._retry(self.url, lambda: self._filesystem.info(self._path))
        if info.get("type") == "directory" or info.get("size") is None:
            raise InputMissing(f"{self.url}: not a file of known size")
        mark = next((info[name] for name in _ETAGS if info.get(name) not in (None, "")), "")
        return Stat(int(info["size"]), str(mark).strip('"'))

    def content(self, like: str = "") -> str:
        return self.opened.mark

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.opened.size)
        if end <= offset:
            return b""
        fetch = self._filesystem.cat_file
        data: bytes = self._retry(self.url, lambda: fetch(self._path, start=offset, end=end))
        return data

    def arrow(self) -> pa.NativeFile:
        return pa.PythonFile(_Seekable(self, self.opened.size), mode="r")

    def close(self) -> None:
        """Do nothing: no connection is held open."""


class _Seekable(io.RawIOBase):
    """Seekable remote file for pyarrow.

    Pyarrow reads small pieces of many columns, so whole blocks are fetched and kept in an LRU cache.
    """

    def __init__(self, source: RemoteSource, size: int) -> None:
        self._source = source
        self._size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, length: int | None = -1) -> bytes:
        if length is None or length < 0:
            length = self._size
        end = min(self._position + length, self._size)
        pieces = []
        while self._position < end:
            number, skip = divmod(self._position, BLOCK_BYTES)
            piece = self._block(number)[skip : skip + end - self._position]
            if not piece:
                break
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            self._blocks[number] = self._source.read_at(number * BLOCK_BYTES, BLOCK_BYTES)
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


class Sources:
    """Factory of sources and trees, with one filesystem per protocol. Thread-safe."""

    def __init__(self, options: StorageSpec) -> None:
        self._options = options
        self._retry = Retry(f" (endpoint {options.endpoint})" if options.endpoint else "")
        self._filesystems: dict[str, Any] = {}

    def open(self, url: str) -> Source:
        path = local_path(url)
        if path is not None:
            return LocalSource(url, path)
        return RemoteSource(url, self._filesystem(url), self._retry)

    def tree(self, url: str) -> Tree:
        """Return the filesystem tree of a URL."""
        if local_path(url) is not None:
            return LocalTree(as_urls=is_file_url(url))
        return RemoteTree(self._filesystem(url), self._retry)

    def _filesystem(self, url: str) -> Any:
        protocol = protocol_of(url)
        if protocol not in self._filesystems:
            self._filesystems[protocol] = connect(url, self._options)
        return self._filesystems[protocol]
