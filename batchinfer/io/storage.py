"""Store of results and records: whole objects below one directory or URL prefix.

Objects are written whole: locally into a temporary file that is then renamed, elsewhere in one upload. Names are
relative and use `/`. Names whose last component begins with a dot belong to this module and are never listed. All
methods are thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import re
import shutil
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from batchinfer.errors import BatchInferError, OutputConflict
from batchinfer.io.filesystem import Retry, already_exists, bucket_missing, connect, local_path, protocol_of, translate
from batchinfer.spec import StorageSpec

TRANSFER_BYTES = 16 << 20
_TEMPORARY = ".tmp"
_OWN = re.compile("batchinfer-[0-9a-f]{32}")  # our temporary files: no other file beside them is touched
_STALE_S = 900.0
# filesystems whose mode="create" is one atomic request; fsspec's generic one checks first and then writes
_CONDITIONAL = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Listed(NamedTuple):
    """An object in a listing. `mark` changes with the content (an ETag); None if the store has none."""

    name: str
    size: int  # bytes
    mark: str | None


class Store(ABC):
    """Objects below `url`. Raises AccessDenied, InputMissing (bucket gone), StorageError; see io.filesystem."""

    batch = 1  # names per concurrent read_many

    def __init__(self, url: str, retry: Retry) -> None:
        self.url = url
        self.retry = retry

    @classmethod
    def open(cls, url: str, options: StorageSpec) -> Store:
        """Return the store of a path or URL. Nothing is contacted or created yet."""
        path = local_path(url)
        return LocalStore(url, path) if path is not None else RemoteStore(url, options)

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the object's content, None if it does not exist."""

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the content of each object, in order. At most `batch` names are read concurrently."""
        return [self.read(name) for name in names]

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[Listed]:
        """Yield the objects whose names begin with `prefix`, in no order, as they are when the listing reaches them."""

    def find(self, prefix: str = "") -> dict[str, int]:
        """Return the current names that begin with `prefix` and their sizes in bytes, sorted."""
        return dict(sorted((entry.name, entry.size) for entry in self.scan(prefix)))

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Write or replace the object."""

    @abstractmethod
    def put_file(self, name: str, local: Path) -> None:
        """Upload a whole file, replacing the object."""

    @abstractmethod
    def get_file(self, name: str, local: Path) -> None:
        """Download the object into a file. Raises InputMissing if it does not exist."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""

    @abstractmethod
    def _create(self, name: str, data: bytes) -> bool:
        """Write the object unless it exists. Return False if it does."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Return True if the object now exists with exactly this content, False if it exists with other content.

        The comparison is needed because a retry after a lost response is refused although the object is ours.
        """
        assert data, "an empty object skips the condition in some clients"
        return self._create(name, data) or self.read(name) == data

    def is_conditional(self, name: str) -> bool:
        """Return True if this store can refuse to replace an object; tested with the existing object `name`.

        Its own content is written, so nothing changes. The test also proves that writing is permitted.
        """
        data = self.read(name)
        return data is not None and not self._create(name, data)

    def _url(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"


class LocalStore(Store):
    """A directory. Temporary files are in its `.tmp`, so that a kill leaves nothing beside the results."""

    def __init__(self, url: str, root: Path) -> None:
        super().__init__(url, Retry(""))
        self._root = root
        self._swept = False

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._to_our_error(error, name) from error

    def scan(self, prefix: str = "") -> Iterator[Listed]:
        for name in self._names(prefix.rpartition("/")[0]):
            if name.startswith(prefix):
                try:
                    size = os.stat(f"{self._root}{os.sep}{name}").st_size  # noqa: PTH116 - many
                except FileNotFoundError:  # deleted meanwhile
                    continue
                except OSError as error:
                    raise self._to_our_error(error, name) from error
                yield Listed(name, size, None)

    def _names(self, folder: str) -> Iterator[str]:
        root = str(self._root)
        start = os.path.join(root, folder)  # noqa: PTH118 - Path would drop a root of "."
        for parent, folders, files in os.walk(start, onerror=self._walk_error):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = parent[len(root) :].replace(os.sep, "/").strip("/")
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
            names = (name for name in (*files, *links) if not name.startswith("."))  # links are listed, not followed
            yield from (f"{below}/{name}" if below else name for name in names)

    def _walk_error(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise translate(error, self.url) from error

    def put(self, name: str, data: bytes) -> None:
        with self._temporary(name) as temporary:
            _write(temporary, data)
            self._move_to(temporary, name)

    def put_file(self, name: str, local: Path) -> None:
        with self._temporary(name) as temporary:
            shutil.copyfile(local, temporary)
            _sync(temporary)
            self._move_to(temporary, name)

    def get_file(self, name: str, local: Path) -> None:
        try:
            shutil.copyfile(self._root / name, local)
        except OSError as error:
            raise self._to_our_error(error, name) from error

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                (self._root / name).unlink(missing_ok=True)
            except OSError as error:
                raise self._to_our_error(error, name) from error

    def _create(self, name: str, data: bytes) -> bool:
        final = self._root / name
        with self._temporary(name) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_exclusive(final, data)
            _sync(final.parent)
            return True

    def _move_to(self, temporary: Path, name: str) -> None:
        final = self._root / name
        if final.is_symlink():  # none of our objects is a link
            raise FileExistsError(errno.EEXIST, "a link")
        temporary.replace(final)
        _sync(final.parent)

    def _to_our_error(self, error: OSError, name: str) -> BatchInferError:
        if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
            return OutputConflict(
                f"{self._url(name)}: another file or folder is in the way ({error.strerror}): move it away"
            )
        return translate(error, self._url(name))

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[Path]:
        """Yield the path of a temporary file, removed afterwards; create the parent of `name`."""
        folder = self._root / _TEMPORARY
        path = folder / f"batchinfer-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)
            self._sweep(folder)
            yield path
        except OSError as error:
            raise self._to_our_error(error, name) from error
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def remove_folders(self, names: Iterable[str]) -> None:
        """Remove all temporary files and those of these folders that are empty; for use when nobody writes any more."""
        remove_files(self._root / _TEMPORARY, _OWN)
        for name in (_TEMPORARY, *names):
            with contextlib.suppress(OSError):
                (self._root / name).rmdir()

    def _sweep(self, folder: Path) -> None:
        """Remove the leftovers of killed processes, once; files still being written are younger."""
        if not self._swept:
            self._swept = True
            remove_files(folder, _OWN, time.time() - _STALE_S)


def remove_files(folder: Path, names: re.Pattern[str], before: float = math.inf) -> None:
    """Remove only files of a folder whose names match and that were last written `before` (Unix time, s)."""
    if not folder.is_dir():
        return
    for path in [path for path in folder.iterdir() if names.fullmatch(path.name)]:
        with contextlib.suppress(OSError):  # already gone, or another user's
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < before:
                path.unlink()


def check_names(url: str, folders: Iterable[str], files: Iterable[str]) -> None:
    """Raise OutputConflict if a file is in the place of a folder or the other way round; only local folders can be."""
    root = local_path(url)
    if root is not None:
        try:
            _check_names(root, folders, files)
        except OSError as error:
            raise translate(error, url) from error


def _check_names(root: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    above = next(path for path in (root, *root.absolute().parents) if os.path.lexists(path))
    for path in (above, *(root / name for name in folders)):
        if os.path.lexists(path) and not path.is_dir():
            raise OutputConflict(f"{path}: is not a folder, but the output needs one there: use another path")
    for path in (root / name for name in files):
        if os.path.lexists(path) and not path.is_file():
            raise OutputConflict(f"{path}: is not a file, but the output needs one there: use another path")
    temporary = root / _TEMPORARY
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_dir()):
        raise OutputConflict(f"{temporary}: is not a folder, but temporary files go there: use another path")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _create_exclusive(path: Path, data: bytes) -> bool:
    """Create a file on filesystems without hard links. A crash may leave a short file, which readers must detect."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()  # as when the disk is full: a short object would block the name forever
        raise
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStore(Store):
    """A prefix on an fsspec filesystem. `retry.total_s` bounds the retries of a call."""

    def __init__(self, url: str, options: StorageSpec) -> None:
        place = f" (endpoint {options.endpoint})" if options.endpoint else ""
        super().__init__(url, Retry(place))
        self._protocol = protocol_of(url)
        self._filesystem = connect(url, options)
        self._root = str(self._filesystem._strip_protocol(url)).rstrip("/")
        # with one connection s3fs reads the object directly instead of asking for its size first
        self.batch = 32 if self._filesystem.async_impl else 1
        self._whole = {"max_concurrency": 1} if self._s3 else {}

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            data: bytes = self._call(name, lambda: self._filesystem.cat_file(path, **self._whole))
        except FileNotFoundError as error:
            self._raise_if_bucket_gone(error)
            return None
        return data

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        if self.batch == 1:
            return super().read_many(names)
        from fsspec.asyn import sync

        async def read_all() -> list[Any]:
            reads = (self._filesystem._cat_file(self._path(name), **self._whole) for name in names)
            return await asyncio.gather(*reads, return_exceptions=True)

        # one concurrent call costs half of a thread per object; failed reads are retried one by one
        results = sync(self._filesystem.loop, read_all)
        return [data if isinstance(data, bytes) else self.read(name) for name, data in zip(names, results, strict=True)]

    def scan(self, prefix: str = "") -> Iterator[Listed]:
        try:
            for path, info in self._list_pages(prefix) if self._s3 else self._list_all(prefix):
                name = path[len(self._root) + 1 :] if path.startswith(f"{self._root}/") else ""
                # some consoles create a key that ends in "/" for a folder
                hidden = name.rpartition("/")[2].startswith(".") or name.endswith("/")
                if name and name.startswith(prefix) and not hidden:
                    mark = info.get("ETag") or info.get("etag")
                    yield Listed(name, int(info["size"]), str(mark).strip('"') if mark else None)
        except FileNotFoundError as error:
            self._raise_if_bucket_gone(error)

    def _list_all(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        folder = f"{self._root}/{prefix.rpartition('/')[0]}".rstrip("/")
        listing = self._call(prefix, lambda: self._filesystem.find(folder, detail=True))
        return ((path, info) for path, info in listing.items() if info.get("type") != "directory")

    def _list_pages(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield objects page by page, because s3fs's own listing keeps a kilobyte per object until its end."""
        bucket, folder, _ = self._filesystem.split_path(f"{self._root}/")
        where = {"Bucket": bucket, "Prefix": f"{folder.strip('/')}/{prefix}".lstrip("/")}
        while True:
            page = self._call(prefix, lambda: self._filesystem.call_s3("list_objects_v2", **where))
            for entry in page.get("Contents", []):
                yield f"{bucket}/{entry['Key']}", {"size": entry["Size"], "ETag": entry.get("ETag")}
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def put(self, name: str, data: bytes) -> None:
        self._write(name, lambda path: self._filesystem.pipe_file(path, data))

    def put_file(self, name: str, local: Path) -> None:
        # s3fs holds chunksize × max_concurrency bytes in memory; its defaults are 50 MiB × 10
        arguments = {"chunksize": TRANSFER_BYTES, "max_concurrency": 2} if self._s3 else {}
        self._write(name, lambda path: self._filesystem.put_file(str(local), path, **arguments))

    def get_file(self, name: str, local: Path) -> None:
        path = self._path(name)
        size = int(self._checked(name, lambda: self._filesystem.info(path))["size"])
        with local.open("wb") as file:
            for start in range(0, size, TRANSFER_BYTES):
                end = min(start + TRANSFER_BYTES, size)
                file.write(self._checked(name, partial(self._filesystem.cat_file, path, start=start, end=end)))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._call(name, partial(self._filesystem.rm_file, self._path(name)))

    def _create(self, name: str, data: bytes) -> bool:
        def attempt(path: str) -> bool:
            try:
                self._filesystem.pipe_file(path, data, mode="create")
            except Exception as error:
                if already_exists(error):
                    return False
                raise
            return True

        return bool(self._write(name, attempt))

    def is_conditional(self, name: str) -> bool:
        return self._protocol in _CONDITIONAL and super().is_conditional(name)

    @property
    def _s3(self) -> bool:
        return self._protocol in ("s3", "s3a")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, action: Callable[..., Any]) -> Any:
        path = self._path(name)
        if not self._s3:  # object stores have no folders; other filesystems need them first
            self._checked(name, lambda: self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True))
        return self._checked(name, lambda: action(path))

    def _call(self, name: str, action: Callable[..., Any]) -> Any:
        """Call with retries and translated errors, except FileNotFoundError."""
        return self.retry(self._url(name), action, passes=(FileNotFoundError,))

    def _checked(self, name: str, action: Callable[..., Any]) -> Any:
        return self.retry(self._url(name), action)

    def _raise_if_bucket_gone(self, error: FileNotFoundError) -> None:
        """Raise InputMissing if the bucket does not exist, rather than just the object."""
        if bucket_missing(error):
            raise translate(error, self.url, self.retry.place) from error
