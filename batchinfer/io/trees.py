"""What lies on a filesystem by name: whether a name is a file or a folder, what a folder holds, what a glob matches.

Paths are as the filesystem spells them; `url` gives the name by which a path is opened again, and that name alone.
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
    """Raises AccessDenied and StorageError, as everything that looks at storage does."""

    place = ""  # appended to messages: which endpoint

    @abstractmethod
    def path(self, url: str) -> str:
        """The path that a URL names."""

    @abstractmethod
    def pattern(self, url: str) -> str:
        """The glob that a URL is."""

    @abstractmethod
    def kind(self, path: str) -> Kind | None:
        """What is there under exactly this name; None for nothing."""

    @abstractmethod
    def below(self, folder: str) -> Iterator[str]:
        """The files at any depth, relative to the folder; of a hidden folder at least its name, with a "/" behind."""

    @abstractmethod
    def glob(self, pattern: str) -> Iterator[tuple[str, Kind]]:
        """What matches. `glob.escape` makes a part of the pattern stand for itself."""

    @abstractmethod
    def url(self, path: str) -> str:
        """What opens exactly this file."""


def refuse_stream(url: str) -> UsageError:
    return UsageError(
        f"{url}: a pipe or device can be read only once, and a job reads its input to count it, to run it, and again "
        "when it continues after a stop: write the rows to a file, and give that"
    )


def hidden(name: str) -> bool:
    """Whether a file or folder is no data by its name, as in Spark: `_SUCCESS`, `.part.crc`, but not `_year=2024`."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


class LocalTree(Tree):
    """`as_urls`: files are to be named as file:// URLs, as the pattern was."""

    def __init__(self, as_urls: bool) -> None:
        self._as_urls = as_urls

    def path(self, url: str) -> str:
        return str(local_path(url))

    def pattern(self, url: str) -> str:
        return str(local_pattern(url))

    def kind(self, path: str) -> Kind | None:
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - Path would alter the name: "./a" is "a" for it
        except PermissionError as error:
            raise translate(error, path) from error
        except (OSError, ValueError):
            return "file" if os.path.lexists(path) else None  # opening it says what is wrong
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
        if here in above:  # a link to a folder that it lies in
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
        return file_url(path) if self._as_urls or not _plain(path) else path


def _refuse_closed(pattern: str) -> None:
    """Raises PermissionError if the folder where a glob begins to match may not be read, which glob takes for empty."""
    parts = pattern.split("/")
    literal = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = "/".join(parts[:literal]) or ("/" if pattern.startswith("/") else ".")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder):
        pass


def _plain(path: str) -> bool:
    """Whether the path means itself where a path or URL may stand, and can be written in UTF-8."""
    return not path.startswith(("~", "file:")) and "://" not in path and path.isprintable()


class RemoteTree(Tree):
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
        found = self._retry(folder, lambda: self._filesystem.find(folder, detail=True))
        prefix = f"{folder.rstrip('/')}/"
        for path, info in sorted(found.items()):
            # a key that ends in "/" is what some consoles create for a folder
            if path.startswith(prefix) and not path.endswith("/") and info.get("type") != "directory":
                yield path[len(prefix) :]

    def glob(self, pattern: str) -> Iterator[tuple[str, Kind]]:
        found = self._retry(pattern, lambda: self._filesystem.glob(pattern, detail=True))
        for path, info in found.items():
            if info.get("type") == "directory":
                yield path.rstrip("/"), "folder"
            elif not path.endswith("/"):
                yield path, "file"

    def url(self, path: str) -> str:
        return str(self._filesystem.unstrip_protocol(path))
