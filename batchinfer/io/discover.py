"""Discovery of the files that `input.path` names: exact names before globs, folders at any depth.

A folder, given by name or matched by a glob, stands for the table files in it and below: names that begin with "." or
"_" are skipped, and files of other kinds are skipped with a log line. A folder that is a Delta, Hudi or Iceberg table
is refused, because not all of its files are current.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from batchinfer.errors import InputError, InputMissing, SpecError
from batchinfer.io.filesystem import local_path, protocol_of
from batchinfer.io.inputs import Format
from batchinfer.io.source import Sources
from batchinfer.io.trees import Tree, hidden, refuse_stream
from batchinfer.log import log
from batchinfer.spec import InputSpec

_PACKED = ("", ".gz", ".zst")
_LINES = tuple(name + packed for name in (".jsonl", ".ndjson") for packed in _PACKED)
_JSON = tuple(f".json{packed}" for packed in _PACKED)  # rows, or metadata in a folder with other data
_PARQUET = (".parquet", ".pq")
_KNOWN = (*_PARQUET, *_LINES, *_JSON)
_OTHER_DATA = (".arrow", ".feather", ".orc", ".avro", ".csv", ".csv.gz", ".tsv", ".lance", ".txt")
_TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_CURRENT_FILES = {"Delta": " (deltalake names them: DeltaTable(path).file_uris())"}
_ANYTHING = ("*", "**")


class FoundFile(NamedTuple):
    """A file to read. `path` is its path on its filesystem."""

    url: str
    path: str
    format: Format

    @property
    def place(self) -> str:
        """Return a value that is equal for two names of one file; links are not resolved."""
        if local_path(self.url) is None:
            return f"{protocol_of(self.url)}:{self.path}"
        return os.path.abspath(self.path)  # noqa: PTH100


def find_files(spec: InputSpec, sources: Sources) -> list[FoundFile]:
    """Return the files of all patterns in order, those of one pattern sorted by path, without duplicates.

    Raises InputMissing, InputError for a folder that is a Delta, Hudi or Iceberg table, UsageError for standard input
    and pipes, SpecError for a named file whose extension is unknown.
    """
    found: dict[str, FoundFile] = {}
    for pattern in spec.path:
        for file in _Pattern(pattern, sources.tree(pattern), spec.format).files():
            found.setdefault(file.place, file)
    return list(found.values())


class _Pattern:
    """One entry of `input.path`."""

    def __init__(self, pattern: str, tree: Tree, form: Format | None) -> None:
        self._pattern = pattern
        self._tree = tree
        self._form = form

    def files(self) -> list[FoundFile]:
        path = self._tree.path(self._pattern)
        kind = self._tree.kind(path)
        if kind == "stream" or (kind is None and self._pattern == "-"):
            raise refuse_stream(self._pattern)
        if kind == "file":
            return [FoundFile(self._pattern, path, self._form or _format(self._pattern))]
        if kind == "folder":
            self._refuse_tables(_partitioned(path))
            found = self._select_files(self._below(path))
        else:
            found = self._matched()
        if not found:
            raise InputMissing(f"nothing matches {self._pattern}{self._tree.place}", key="input.path")
        return sorted(found, key=lambda file: file.path)

    def _matched(self) -> list[FoundFile]:
        parts, literal = self._split_pattern()
        prefixes = {part[0] for part in parts[literal:] if part.startswith(("_", "."))}
        matches = [(path, kind) for path, kind in self._tree.glob("/".join(parts)) if _visible(path, literal, prefixes)]
        folders = {path for path, kind in matches if kind == "folder"}
        named = {path for path, kind in matches if kind == "file" and folders.isdisjoint(_above(path))}
        self._refuse_tables(_around([path for path in named if _name(path).endswith(_PARQUET)], literal))
        inside = {path for folder in folders if folders.isdisjoint(_above(folder)) for path in self._below(folder)}
        if parts[-1] in _ANYTHING:  # matches everything, like a folder
            return self._select_files(inside | named)
        own = (self._found(path, self._form or _format(path)) for path in named)
        return [*self._select_files(inside), *own]

    def _split_pattern(self) -> tuple[list[str], int]:
        """Return the parts of the glob and the number of leading literal parts.

        A part that exists by its exact name is literal, too.
        """
        parts = self._tree.pattern(self._pattern).split("/")
        for number, part in enumerate(parts):
            if glob.has_magic(part):
                if self._tree.kind("/".join([*map(_unescaped, parts[:number]), part])) is None:
                    return parts, number
                parts[number] = glob.escape(part)
        return parts, len(parts)

    def _below(self, folder: str) -> Iterator[str]:
        """Yield the files of a folder that are not hidden. Raises InputError if they belong to a table."""
        inside = "" if folder == "." else f"{folder.rstrip('/')}/"
        for name in self._tree.below(folder):
            if (table := _table_with(name)) is not None:
                raise self._table(f"{inside}{table[0]}".rstrip("/"), table[1])
            if not any(map(hidden, name.rstrip("/").split("/"))):
                yield inside + name

    def _select_files(self, inside: Iterable[str]) -> list[FoundFile]:
        """Return the files in folders that are to be read."""
        paths = sorted(inside)
        selected = self._select_formats(paths)
        left = sorted(set(paths).difference(path for path, _ in selected))
        if left and not selected:
            raise InputMissing(
                f"{self._pattern}{self._tree.place}: of {len(left)} files, such as {left[0]}, none has a known "
                f"extension ({', '.join(_KNOWN)}); set input.format if they are lines or Parquet",
                key="input.path",
            )
        if left:
            log.warning("files of other kinds are skipped", path=self._pattern, files=len(left), first=left[0])
        return [self._found(path, form) for path, form in selected]

    def _select_formats(self, paths: list[str]) -> list[tuple[str, Format]]:
        """Select files by format.

        `.json` counts only without other data, because it usually describes data files beside it.
        """
        names = {path: _name(path) for path in paths}
        lines = [path for path in paths if names[path].endswith(_LINES)]
        parquet = [path for path in paths if names[path].endswith(_PARQUET)]
        loose = [path for path in paths if names[path].endswith(_JSON)]
        if self._form is None:
            if not lines and not parquet and not any(name.endswith(_OTHER_DATA) for name in names.values()):
                lines = loose
            return [*((path, "parquet") for path in parquet), *((path, "jsonl") for path in lines)]
        matching = parquet if self._form == "parquet" else lines or loose
        return [(path, self._form) for path in matching or [path for path in paths if not names[path].endswith(_KNOWN)]]

    def _found(self, path: str, form: Format) -> FoundFile:
        return FoundFile(self._tree.url(path), path, form)

    def _refuse_tables(self, folders: Iterable[str]) -> None:
        for folder in folders:
            inside = f"{folder}/" if folder else ""
            for marker, name in _TABLES.items():
                if self._tree.kind(inside + marker) == "folder":
                    raise self._table(folder, name)
            if self._tree.kind(f"{inside}metadata") == "folder" and any(
                map(_table_with, (f"metadata/{name}" for name in self._tree.below(f"{inside}metadata")))
            ):
                raise self._table(folder, "Iceberg")

    def _table(self, folder: str, kind: str) -> InputError:
        name = self._tree.url(folder) if folder else self._pattern
        hint = _CURRENT_FILES.get(kind, "")
        article = "an" if kind == "Iceberg" else "a"
        return InputError(
            f"{name}: is {article} {kind} table, whose files also hold deleted or replaced rows: give the "
            f"list of its current files{hint}, or write the table out as plain Parquet and read that",
            key="input.path",
        )


def _format(url: str) -> Format:
    name = _name(url)
    if name.endswith(_PARQUET):
        return "parquet"
    if name.endswith((*_LINES, *_JSON)):
        return "jsonl"
    known = ", ".join(_KNOWN)
    raise SpecError(f"{url}: its name has no known extension ({known}); set input.format", key="input.path")


def _name(url: str) -> str:
    if protocol_of(url) in ("http", "https"):
        url = url.partition("?")[0]
    return url.lower().rpartition("/")[2]


def _unescaped(part: str) -> str:
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _visible(path: str, literal: int, prefixes: set[str]) -> bool:
    """Return True unless the match is hidden or in a hidden folder; the glob itself names the allowed `prefixes`."""
    return not any(hidden(part) and part[0] not in prefixes for part in path.split("/")[literal:])


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _partitioned(folder: str) -> Iterator[str]:
    """Yield the folders of which `folder` may be a partition or, as in Iceberg, the data folder."""
    while "=" in folder.rpartition("/")[2]:
        folder = folder.rpartition("/")[0]
        yield folder
    above, slash, name = folder.rpartition("/")
    if name == "data" and slash:
        yield above


def _around(files: list[str], literal: int) -> list[str]:
    """Return the folders that may be tables: from the first level that the glob matches down to the partitions."""
    parts = [path.split("/") for path in files]
    folders = {"/".join(own[:depth]) for own in parts for depth in range(literal, len(own))}
    folders.update(*(_partitioned("/".join(own[:literal])) for own in parts))
    return sorted(folder for folder in folders if "=" not in folder.rpartition("/")[2])


def _table_with(name: str) -> tuple[str, str] | None:
    """Return the folder and the kind of the table to which a file or hidden folder of this name belongs."""
    *folders, last = name.split("/")
    for place, folder in enumerate(folders):
        if folder in _TABLES:
            return "/".join(folders[:place]), _TABLES[folder]
    if last.endswith(".metadata.json") and folders[-1:] == ["metadata"]:
        return "/".join(folders[:-1]), "Iceberg"
    return None
