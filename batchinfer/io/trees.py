"""Read access to a filesystem by name: kinds of names, folder contents, globs.

Paths are as the filesystem spells them; `url` returns the name that opens exactly this path again.
"""

from __future__ import annotations

import contextlib
import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from stat import S_ISDIR, S_ISREG
from typing import Any, Literal

from batchinfer.errors import UsageError
from batchinfer.io.filesystem import Retry, file_url, local_path, local_pattern, translate

Kind = Literal["file", "folder", "stream"]


class Tree(ABC):
    """Names on one filesystem. Raises AccessDenied and StorageError, as all storage access does."""

    place = ""  # appended to messages: which endpoint

    @abstractmethod
    def path(self, url: str) -> str:
        """Return the path of a URL."""

    @abstractmethod
    def pattern(self, url: str) -> str:
        """Return the URL as a glob."""

    @abstractmethod
    def kind(self, path: str) -> Kind | None:
        """Return the kind of the entry with exactly this name; None if there is none."""

    @abstractmethod
    def below(self, folder: str) -> Iterator[str]:
        """Yield the files at any depth, relative to the folder.

        Of a hidden folder, yield at least its name with a trailing "/".
        """

    @abstractmethod
    def glob(self, pattern: str) -> Iterator[tuple[str, Kind]]:
        """Yield the matches and their kinds. `glob.escape` makes a part of the pattern literal."""

    @abstractmethod
    def url(self, path: str) -> str:
        """Return the name that opens exactly this file."""


def refuse_stream(url: str) -> UsageError:
    return UsageError(
        f"{url}: a pipe or device can be read only once, but a job reads its input to count it, to run it, and again "
        "when it resumes after a stop: write the rows to a file and use that file"
    )


def hidden(name: str) -> bool:
    """Return True if the name marks metadata, as in Spark: `_SUCCESS`, `.part.crc`, but not `_year=2024`."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


class LocalTree(Tree):
    """The local filesystem. `as_urls`: return files as file:// URLs, because the pattern was one."""

    def __init__(self, as_urls: bool) -> None:
        self._as_urls = as_urls

    def path(self, url: str) -> str:
        return str(local_path(url))

    def pattern(self, url: str) -> str:
        return str(local_pattern(url))

    def kind(self, path: str) -> Kind | None:
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - Path would alter the name: "./a" becomes "a"
        except PermissionError as error:
            raise translate(error, path) from error
        except (OSError, ValueError):
            return "file" if os.path.lexists(path) else None  # opening it raises the error
        return "folder" if S_ISDIR(mode) else "file" if S_ISREG(mode) else "stream"

    def below(self, folder: str) -> Iterator[str]:
        yield from self._below(folder, "", frozenset())

    def _below(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            status = os.stat(folder)  # noqa: PTH116
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise translate(error, folder) from error
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to one of its own parent folders
            return
        for entry in ordered:
            name = prefix + entry.name
            if not entry.is_dir():
                yield name
            elif hidden(entry.name):
                yield f"{name}/"
            else:
                yield from self._below(entry.path, f"{name}/", above | {here})

    def glob(self, pattern: str) -> Iterator[tuple[str, Kind]]:
        try:
            matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                _refuse_closed(pattern)
        except OSError as error:
            raise translate(error, pattern) from error
        for match in matches:
            path = match.rstrip("/") or "/"
            yield path, "folder" if self.kind(path) == "folder" else "file"

    def url(self, path: str) -> str:
        return file_url(path) if self._as_urls or not _is_unambiguous(path) else path


def _refuse_closed(pattern: str) -> None:
    """Raise PermissionError if a glob's first folder is unreadable: `glob` treats such a folder as empty."""
    parts = pattern.split("/")
    literal = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = "/".join(parts[:literal]) or ("/" if pattern.startswith("/") else ".")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder):
        pass


def _is_unambiguous(path: str) -> bool:
    """Return True if the path is unambiguous as a path or URL and can be encoded in UTF-8."""
    return not path.startswith(("~", "file:")) and "://" not in path and path.isprintable()


class RemoteTree(Tree):
    """An fsspec filesystem."""

    def __init__(self, filesystem: Any, retry: Retry) -> None:
        self._filesystem = filesystem
        self._retry = retry
        self.place = retry.place

    def path(self, url: str) -> str:
        return str(self._filesystem._strip_protocol(url))

    def pattern(self, url: str) -> str:
        return self.path(url)

    def kind(self, path: str) -> Kind | None:
        try:
            info = self._retry(path, lambda: self._filesystem.info(path), passes=(FileNotFoundError,))
        except FileNotFoundError:
            return None
        return "folder" if info.get("type") == "directory" else "file"

    def below(self, folder: str) -> Iterator[str]:
        listing = self._retry(folder, lambda: self._filesystem.find(folder, detail=True))
        prefix = f"{folder.rstrip('/')}/"
        for path, info in sorted(listing.items()):
            # some consoles create a key that ends in "/" for a folder
            if path.startswith(prefix) and not path.endswith("/") and info.get("type") != "directory":
                yield path[len(prefix) :]

    def glob(self, pattern: str) -> Iterator[tuple[str, Kind]]:
        matches = self._retry(pattern, lambda: self._filesystem.glob(pattern, detail=True))
        for path, info in matches.items():
            if info.get("type") == "directory":
                yield path.rstrip("/"), "folder"
            elif not path.endswith("/"):
                yield path, "file"

    def url(self, path: str) -> str:
        return str(self._filesystem.unstrip_protocol(path))
