"""The words of an audit: what the output should hold, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_NAMED = 20  # rows or ranges that one line names


@dataclass(frozen=True, slots=True)
class Difference:
    """`where` is an object of the output or an input file; `rows` are positions in an input file."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass
class Audit:
    """Result of an audit: counts of what was read, and the differences."""

    url: str
    chunks: int = 0
    rows: int = 0  # input rows with exactly one output, as they should
    parts: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    def note(self, where: str, what: str) -> None:
        self.differences.append(Difference(where, what))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `start` to `stop - 1` of input file `url`."""

    number: int
    file: int
    url: str
    start: int
    stop: int
    base: int  # index of row `start` in the whole job


@dataclass(frozen=True)
class PlannedOutput:
    """Shape of the output as plan.json and job.json have it."""

    chunks: list[Chunk]
    where: str | None
    exploded: bool
    prefix: str
    format: str
    file_column: str | None

    @property
    def lines(self) -> bool:
        return self.format != "parquet"

    @classmethod
    def of(cls, plan: Mapping[str, Any], job: Mapping[str, Any]) -> PlannedOutput:
        chunks: list[Chunk] = []
        base = 0
        for number, file in enumerate(plan["files"]):
            for start in range(0, file["taken"], file["chunk_rows"]):
                stop = min(start + file["chunk_rows"], file["taken"])
                chunks.append(Chunk(len(chunks), number, file["url"], start, stop, base + start))
            base += file["taken"]
        chunks = chunks or [Chunk(0, 0, plan["files"][0]["url"], 0, 0, 0)]  # of no rows; its part shows the columns
        output = job.get("output", {})
        format_ = output.get("format") or plan["files"][0]["format"]
        exploded = output.get("samples") == "rows" and format_ != "openai-batch"
        where, prefix = job.get("input", {}).get("where"), output.get("prefix") or ""
        return cls(chunks, where, exploded, prefix, format_, output.get("file_column"))

    def of_file(self, chunk: Chunk) -> dict[str, str]:
        """Return the column of the input file, which is the same in every row of the chunk."""
        return {} if self.file_column is None else {self.file_column: chunk.url}


def name_spans(spans: Iterable[tuple[int, int]]) -> str:
    """`"0-999, 2000-2999"` of half-open spans in ascending order; neighbours are joined."""
    joined: list[list[int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    named = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in joined[:_MAX_NAMED]]
    more = f" and {len(joined) - _MAX_NAMED} more" if len(joined) > _MAX_NAMED else ""
    return ", ".join(named) + more


def name_rows(rows: Iterable[int]) -> str:
    return name_spans((row, row + 1) for row in sorted(rows))


@dataclass(frozen=True, slots=True)
class Record:
    """A commit record; `name` is the object that holds it."""

    name: str
    values: dict[str, Any]

    @property
    def part(self) -> str | None:
        return self.values.get("part")
