"""Check that a job's input and output do not overlap: a second run would read the results of the first."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

from batchinfer.errors import OutputConflict
from batchinfer.io.discover import find_files
from batchinfer.io.filesystem import local_path, local_pattern, protocol_of
from batchinfer.io.source import Sources
from batchinfer.io.trees import hidden
from batchinfer.job.columns import LINE_SUFFIX
from batchinfer.job.ledger import COMMITS, JOB, PARTS
from batchinfer.job.manifest import MANIFEST
from batchinfer.job.plan import PLAN
from batchinfer.job.salvage import SALVAGE
from batchinfer.job.summaries import SUMMARIES
from batchinfer.spec import JobSpec, OutputSpec

_SAME_STORE = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "local": "file"}
_ESCAPED = re.compile(r"\[([*?[])\]")  # as glob.escape does


class Location(NamedTuple):
    """Target of a path or URL: equal for two names of one thing, links and relative paths resolved."""

    protocol: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, url: str) -> Location:
        path = local_path(url)
        if path is not None:
            return cls("file", Path(os.path.realpath(path)).parts)
        protocol = protocol_of(url)
        container, slash, key = url.partition("://")[2].strip("/").partition("/")
        if _SAME_STORE.get(protocol, protocol) == "abfs":  # abfs://container@account…/key is az://container/key
            container = container.partition("@")[0]
        return cls(_SAME_STORE.get(protocol, protocol), (container, *(key.split("/") if slash else ())))

    def below(self, other: Location) -> tuple[str, ...] | None:
        """Return the rest of the name if this is `other` or lies below it."""
        whole = self.protocol == other.protocol and self.parts[: len(other.parts)] == other.parts
        return self.parts[len(other.parts) :] if whole else None


def refuse_overlap(spec: JobSpec) -> None:
    """Raise OutputConflict if an entry of `input.path` lies under the output or would match what the job writes there.

    What the job will write counts as if it were there: a first run is refused as a second one would be.
    """
    output = Location.of(spec.output.path)
    for pattern in spec.input.path:
        head, rest = _split(pattern)
        if head.below(output) is not None:
            raise _lies_under(pattern, spec.output)
        between = output.below(head)
        if between is None:
            continue
        taken = next((name for name in _written(spec.output) if _takes(rest, (*between, *name))), None)
        if taken is not None:
            example = taken[0] if len(taken) == 1 else f"{taken[0]}/…{taken[1][taken[1].index('.') :]}"
            raise OutputConflict(
                f"{pattern}: takes in what this job writes, {spec.output.path.rstrip('/')}/{example} among it, and run "
                "again it would read its own results: name the input more narrowly, or give the job an output.path "
                "outside of it",
                key="input.path",
            )
        if _reaches(rest, between):  # it may match what somebody else put there
            alone = spec.input.model_copy(update={"path": (pattern,)})
            refuse_inside(spec, (file.url for file in find_files(alone, Sources(spec.storage))))


def refuse_inside(spec: JobSpec, urls: Iterable[str]) -> None:
    """Raise OutputConflict if a file of the input lies under the output, by whatever way it was found."""
    output = Location.of(spec.output.path)
    resolved = cache(os.path.realpath)
    for url in urls:
        path = local_path(url)
        if path is None or path.is_symlink():
            place = Location.of(url)
        else:
            place = Location("file", Path(resolved(path.parent), path.name).parts)
        if place.below(output) is not None:
            raise _lies_under(url, spec.output)


def _lies_under(name: str, output: OutputSpec) -> OutputConflict:
    return OutputConflict(
        f"{name}: lies under output.path ({output.path}): give the job an output.path that holds none of its input",
        key="input.path",
    )


def _split(pattern: str) -> tuple[Location, tuple[str, ...]]:
    """Return the folder or file that a pattern begins with, and the names of the glob below it."""
    found = local_pattern(pattern)
    if found is None:
        scheme, _, text = pattern.partition("://")
        parts = text.split("/")
        number = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        return Location.of(f"{scheme}://{'/'.join(parts[:number])}"), tuple(parts[number:])
    path = Path(found)
    head, parts = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while parts and (name := _plain(head, parts[0])) is not None:
        head /= name
        del parts[0]
    return Location("file", Path(os.path.realpath(head)).parts), tuple(parts)


def _plain(folder: Path, part: str) -> str | None:
    """Return the name that one name of a glob stands for; an existing name with brackets means itself."""
    if os.path.lexists(folder / part):
        return part
    return None if glob.has_magic(_ESCAPED.sub("", part)) else _ESCAPED.sub(r"\1", part)


def _written(output: OutputSpec) -> list[tuple[str, ...]]:
    """Return one name of each kind that a job writes below its output."""
    endings = [".parquet"] if output.format in (None, "parquet") else []
    if output.format != "parquet":
        endings.append(f".jsonl{LINE_SUFFIX.get(output.compression or 'none', '')}")
    parts = [f"{PARTS}part-000000-{'0' * 8}-{'0' * 16}{ending}" for ending in endings]
    names = [
        *parts,
        f"{SALVAGE}0-of-1-{'0' * 8}.jsonl.zst",
        f"{COMMITS}000000.json",
        f"{SUMMARIES}000000-1-16-{'0' * 8}.jsonl.zst",
        PLAN,
        JOB,
        MANIFEST,
        "report.json",
    ]
    return [tuple(name.split("/")) for name in names]


def _takes(pattern: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Return True if a glob matches a name, or a folder above it, which stands for its files that are not hidden."""
    if not pattern:
        return not any(map(hidden, name))
    if not name:
        return False
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return _takes(rest, name) or (rest[:1] != ("**",) and not hidden(name[0]) and _takes(pattern, name[1:]))
    shown = not hidden(name[0]) or first[0] == name[0][0]
    return shown and fnmatchcase(name[0], first) and _takes(rest, name[1:])


def _reaches(pattern: tuple[str, ...], folder: tuple[str, ...]) -> bool:
    """Return True if a glob can match anything below a folder."""
    if not folder or not pattern or pattern[0] == "**":
        return bool(pattern)
    return fnmatchcase(folder[0], pattern[0]) and _reaches(pattern[1:], folder[1:])
