"""Which files `input.path` names: exact names before globs, folders at any depth, and what in them is read.

A folder, named or matched by a glob, stands for the files in it and below that a reader of tables would take: names
that begin with "." or "_" are left out, and so are, with a line in the log, files of other kinds. A folder that is a
table of its own kind, whose files are not all current, is refused.
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
_LOOSE = tuple(f".json{packed}" for packed in _PACKED)  # rows, but in a folder of other data what describes it
_PARQUET = (".parquet", ".pq")
_KNOWN = (*_PARQUET, *_LINES, *_LOOSE)
_OTHER_DATA = (".arrow", ".feather", ".orc", ".avro", ".csv", ".csv.gz", ".tsv", ".lance", ".txt")
_TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_CURRENT_FILES = {"Delta": " (deltalake names them: DeltaTable(path).file_uris())"}
_ANYTHING = ("*", "**")


class Found(NamedTuple):
    """A file to read. `path`: as its filesystem spells it."""

    url: str
    path: str
    format: Format

    @property
    def place(self) -> str:
        """Equal for one file by two names, links left out."""
        if local_path(self.url) is None:
            return f"{protocol_of(self.url)}:{self.path}"
        return os.path.abspath(self.path)  # noqa: PTH100


def find_files(spec: InputSpec, sources: Sources) -> list[Found]:
    """The files of all patterns in their order; those of one pattern are sorted by path, and none is taken twice.

    Raises InputMissing, InputError for a folder that is a table of another kind, UsageError for standard input and
    pipes, SpecError for a file that was asked for and whose name does not tell its format.
    """
    found: dict[str, Found] = {}
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

    def files(self) -> list[Found]:
        path = self._tree.path(self._pattern)
        kind = self._tree.kind(path)
        if kind == "stream" or (kind is None and self._pattern == "-"):
            raise refuse_stream(self._pattern)
        if kind == "file":
            return [Found(self._pattern, path, self._form or _format(self._pattern))]
        if kind == "folder":
            self._refuse_tables(_partitioned(path))
            found = self._read_of(self._below(path))
        else:
            found = self._matched()
        if not found:
            raise InputMissing(f"nothing matches {self._pattern}{self._tree.place}", key="input.path")
        return sorted(found, key=lambda file: file.path)

    def _matched(self) -> list[Found]:
        parts, literal = self._parts()
        asked = {part[0] for part in parts[literal:] if part.startswith(("_", "."))}
        matches = [(path, kind) for path, kind in self._tree.glob("/".join(parts)) if _shown(path, literal, asked)]
        folders = {path for path, kind in matches if kind == "folder"}
        named = {path for path, kind in matches if kind == "file" and folders.isdisjoint(_above(path))}
        self._refuse_tables(_around([path for path in named if _name(path).endswith(_PARQUET)], literal))
        inside = {path for folder in folders if folders.isdisjoint(_above(folder)) for path in self._below(folder)}
        if parts[-1] in _ANYTHING:  # as good as a folder
            return self._read_of(inside | named)
        own = (self._found(path, self._form or _format(path)) for path in named)
        return [*self._read_of(inside), *own]

    def _parts(self) -> tuple[list[str], int]:
        """The parts of the glob, and how many of the first stand for themselves: those that exist exactly so, too."""
        parts = self._tree.pattern(self._pattern).split("/")
        for number, part in enumerate(parts):
            if glob.has_magic(part):
                if self._tree.kind("/".join([*map(_unescaped, parts[:number]), part])) is None:
                    return parts, number
                parts[number] = glob.escape(part)
        return parts, len(parts)

    def _below(self, folder: str) -> Iterator[str]:
        """The files of a folder that are not hidden. Raises InputError if they are those of a table."""
        inside = "" if folder == "." else f"{folder.rstrip('/')}/"
        for name in self._tree.below(folder):
            if (table := _table_with(name)) is not None:
                raise self._table(f"{inside}{table[0]}".rstrip("/"), table[1])
            if not any(map(hidden, name.rstrip("/").split("/"))):
                yield inside + name

    def _read_of(self, inside: Iterable[str]) -> list[Found]:
        """Those of the files in folders that are read."""
        paths = sorted(inside)
        taken = self._taken(paths)
        left = sorted(set(paths).difference(path for path, _ in taken))
        if left and not taken:
            raise InputMissing(
                f"{self._pattern}{self._tree.place}: of {len(left)} files, such as {left[0]}, none is known by its "
                f"name as {', '.join(_KNOWN)}; set input.format if they are lines or Parquet",
                key="input.path",
            )
        if left:
            log.warning("files of other kinds are not read", path=self._pattern, files=len(left), first=left[0])
        return [self._found(path, form) for path, form in taken]

    def _taken(self, paths: list[str]) -> list[tuple[str, Format]]:
        """`.json` counts where there is no other data: beside that it is what describes it."""
        names = {path: _name(path) for path in paths}
        lines = [path for path in paths if names[path].endswith(_LINES)]
        parquet = [path for path in paths if names[path].endswith(_PARQUET)]
        loose = [path for path in paths if names[path].endswith(_LOOSE)]
        if self._form is None:
            if not lines and not parquet and not any(name.endswith(_OTHER_DATA) for name in names.values()):
                lines = loose
            return [*((path, "parquet") for path in parquet), *((path, "jsonl") for path in lines)]
        told = parquet if self._form == "parquet" else lines or loose
        return [(path, self._form) for path in told or [path for path in paths if not names[path].endswith(_KNOWN)]]

    def _found(self, path: str, form: Format) -> Found:
        return Found(self._tree.url(path), path, form)

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
            f"{name}: is {article} {kind} table, whose files also hold rows that were deleted or replaced: give the "
            f"list of its current files{hint}, or write the table out as plain Parquet and read that",
            key="input.path",
        )


def _format(url: str) -> Format:
    name = _name(url)
    if name.endswith(_PARQUET):
        return "parquet"
    if name.endswith((*_LINES, *_LOOSE)):
        return "jsonl"
    known = ", ".join(_KNOWN)
    raise SpecError(f"{url}: its name does not tell the format (known: {known}); set input.format", key="input.path")


def _name(url: str) -> str:
    if protocol_of(url) in ("http", "https"):
        url = url.partition("?")[0]
    return url.lower().rpartition("/")[2]


def _unescaped(part: str) -> str:
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _shown(path: str, literal: int, asked: set[str]) -> bool:
    """Whether a match is no hidden file, or in a hidden folder, unless the glob asks for names that begin so."""
    return not any(hidden(part) and part[0] not in asked for part in path.split("/")[literal:])


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _partitioned(folder: str) -> Iterator[str]:
    """The folders that hold `folder` as a partition, or, as Iceberg has it, as the data of a table."""
    while "=" in folder.rpartition("/")[2]:
        folder = folder.rpartition("/")[0]
        yield folder
    above, slash, name = folder.rpartition("/")
    if name == "data" and slash:
        yield above


def _around(files: list[str], literal: int) -> list[str]:
    """The folders of files of which a table may be one: where the glob begins to match, and below to its partitions."""
    parts = [path.split("/") for path in files]
    folders = {"/".join(own[:depth]) for own in parts for depth in range(literal, len(own))}
    folders.update(*(_partitioned("/".join(own[:literal])) for own in parts))
    return sorted(folder for folder in folders if "=" not in folder.rpartition("/")[2])


def _table_with(name: str) -> tuple[str, str] | None:
    """The folder and the kind of the table that a file or hidden folder of this name is part of."""
    *folders, last = name.split("/")
    for place, folder in enumerate(folders):
        if folder in _TABLES:
            return "/".join(folders[:place]), _TABLES[folder]
    if last.endswith(".metadata.json") and folders[-1:] == ["metadata"]:
        return "/".join(folders[:-1]), "Iceberg"
    return None
