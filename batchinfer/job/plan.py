"""Plan of a job: the input files as they were, cut into chunks of fixed row ranges, and the fingerprint.

`plan.json` is written once, put-if-absent. It names files, not chunks: chunk ranges follow from rows per chunk, so it
stays small for any number of rows, and it holds no time of day.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, overload

import orjson
import pyarrow as pa

from batchinfer.errors import InputError, InputMissing, OutputConflict, SpecError, suggest
from batchinfer.io.filesystem import local_path
from batchinfer.io.rows import InputFile, Inputs, RowSpan
from batchinfer.io.storage import Store
from batchinfer.io.types import is_listed, is_text, row_type
from batchinfer.job import fingerprint as prints
from batchinfer.job.columns import OutputLayout
from batchinfer.spec import JobSpec
from batchinfer.text.row_names import spelling

PLAN = "plan.json"
_MARK_CHARS = 8
CHUNK_BYTES = 32 << 20  # a few chunks are in memory at once: read ahead, made into prompts, built into parts
_EXPANSION = {"parquet": 4, ".gz": 6, ".zst": 6}  # text against its compressed size, roughly


@dataclass(frozen=True)
class Chunks(Sequence[RowSpan]):
    """The spans of a plan's chunks, made when they are asked for: there may be 100,000."""

    bases: tuple[int, ...]  # index in the job of each chunk's first row
    starts: tuple[int, ...]  # of each file's first row, and of the end
    steps: tuple[int, ...]  # rows per chunk, for each file

    def __len__(self) -> int:
        return len(self.bases)

    @overload
    def __getitem__(self, place: int) -> RowSpan: ...
    @overload
    def __getitem__(self, place: slice) -> list[RowSpan]: ...
    def __getitem__(self, place: int | slice) -> RowSpan | list[RowSpan]:
        if isinstance(place, slice):
            return list(map(self.__getitem__, range(len(self))[place]))
        base = self.bases[place]
        file = bisect.bisect_right(self.starts, base, 0, len(self.steps)) - 1 if self.starts[-1] else 0
        start, stop = self.starts[file : file + 2]
        return RowSpan(file, base - start, min(self.steps[file], stop - base))


@dataclass(frozen=True)
class JobPlan:
    """Chunk i covers `chunks[i]`; its first row has the global index `bases[i]`. Chunks never cross files.

    There is a chunk even where there are no rows: its part shows the columns.
    """

    inputs: Inputs
    chunk_rows: tuple[int, ...]  # rows per chunk, for each file
    taken: tuple[int, ...]  # rows of each file that the job covers: all, unless input.limit ends it earlier
    fingerprint: dict[str, str]
    chunks: Chunks = field(init=False, repr=False)
    bases: tuple[int, ...] = field(init=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        bases: list[int] = []
        starts = (0, *accumulate(self.taken))
        for start, stop, step in zip(starts, starts[1:], self.chunk_rows, strict=False):
            bases.extend(range(start, stop, step))
        object.__setattr__(self, "bases", tuple(bases) or (0,))
        object.__setattr__(self, "chunks", Chunks(self.bases, starts, self.chunk_rows))
        object.__setattr__(self, "digest", prints.digest(self.fingerprint))

    @property
    def mark(self) -> str:
        """Hexadecimal, in the name of every object that the job may delete again: what lacks it is not the job's."""
        return self.digest[:_MARK_CHARS]

    @property
    def rows(self) -> int:
        """Rows that the chunks cover, before `where`."""
        return sum(self.taken)

    def chunk_of(self, index: int) -> int:
        """Return the chunk that holds the row of this global index."""
        return bisect.bisect_right(self.bases, index) - 1

    def to_bytes(self) -> bytes:
        values = {
            "format": prints.FORMAT_VERSION,
            "digest": self.digest,
            "rows": self.rows,
            "chunks": len(self.chunks),
            "fingerprint": self.fingerprint,
            "schema": {name: str(self.inputs.schema.field(name).type) for name in self.inputs.schema.names},
            "arrow_schema": base64.b64encode(self.inputs.schema.serialize().to_pybytes()).decode(),
            "text_json": sorted(self.inputs.text_json),
            "files": [
                {**file.to_dict(), "chunk_rows": rows, "taken": taken}
                for file, rows, taken in zip(self.inputs.files, self.chunk_rows, self.taken, strict=True)
            ],
        }
        return json.dumps(values, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str = PLAN) -> JobPlan:
        """Raise OutputConflict for bytes that are not a plan of this version, or a plan that was altered."""
        try:
            values = orjson.loads(data)
            found = values["format"] if "fingerprint" in values else None  # another tool's plan has a format, too
            if found not in (None, prints.FORMAT_VERSION):
                raise OutputConflict(
                    f"{where}: written by a version of batchinfer with output format {found}, this one writes "
                    f"{prints.FORMAT_VERSION}; use that version, or another output.path"
                )
            plan = cls._from_values(values)
        except (KeyError, TypeError, ValueError, AttributeError, pa.ArrowException):
            what = "not a plan of batchinfer, or a damaged one" if data else "empty, as a crash may leave it"
            raise OutputConflict(f"{where}: {what}: move it away, or use another output.path") from None
        if (plan.digest, plan.rows, len(plan.chunks)) != (values["digest"], values["rows"], values["chunks"]):
            raise OutputConflict(f"{where}: altered after it was written; restore it, or use another output.path")
        return plan

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> JobPlan:
        files = values["files"]
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["arrow_schema"])))
        own = ("chunk_rows", "taken")
        described = [{name: value for name, value in file.items() if name not in own} for file in files]
        inputs = Inputs(
            files=tuple(InputFile.from_dict(file) for file in described),
            schema=schema,
            text_json=frozenset(values["text_json"]),
        )
        rows = tuple(file["chunk_rows"] for file in files)
        return cls(inputs, rows, tuple(file["taken"] for file in files), values["fingerprint"])


def make_plan(
    spec: JobSpec, inputs: Inputs, layout: OutputLayout, identities: Mapping[str, str], taken: tuple[int, ...]
) -> JobPlan:
    """`identities`: hashes of model and tokenizer. `taken`: how many rows of each file the job covers."""
    parts = prints.fingerprint(spec, layout, identities, _files_hash(inputs))
    # with a limit, `file.rows` says little of how large a row is
    sized = spec.input.limit is None or spec.input.where is not None
    asked = spec.output.chunk_rows
    sizes = tuple(_rows_per_chunk(file, asked) if sized else asked for file in inputs.files)
    return JobPlan(inputs, sizes, taken, parts)


def save_plan(plan: JobPlan, store: Store) -> JobPlan:
    """Write plan.json, or agree with the one that is there. Returns the plan that stands, whose files are read here.

    Raises OutputConflict that says what differs.
    """
    if store.put_if_absent(PLAN, plan.to_bytes()):
        return plan
    where = f"{store.url}/{PLAN}"
    theirs = load_plan(store)
    refuse_other(plan, theirs, where)
    if plan.taken != theirs.taken:
        raise OutputConflict(f"{where}: covers other row ranges than this job would; use another output.path")
    pairs = zip(plan.inputs.files, theirs.inputs.files, strict=True)
    files = tuple(replace(ours, known_as=before.name) for ours, before in pairs)
    return replace(plan, inputs=replace(plan.inputs, files=files), chunk_rows=theirs.chunk_rows)


def refuse_other(ours: JobPlan, theirs: JobPlan, where: str) -> None:
    """Raise OutputConflict that names every setting in which plans differ, and which input file changed."""
    parts = ours.fingerprint
    if parts["input.files"] != theirs.fingerprint.get("input.files"):
        files = ours.inputs.files
        changed = _first_change(files, theirs.inputs.files)
        parts = {**parts, "input.files": f"{len(files)} {'file' if len(files) == 1 else 'files'}; {changed}"}
    prints.refuse_difference(parts, theirs.fingerprint, where)


def load_plan(store: Store) -> JobPlan:
    data = store.read(PLAN)
    if data is None:
        raise InputMissing(f"{store.url} holds no {PLAN}: no job has written there")
    return JobPlan.from_bytes(data, f"{store.url}/{PLAN}")


def check_columns(needed: Mapping[str, frozenset[str]], inputs: Inputs, sources: Mapping[str, str]) -> None:
    """`needed`: job key → columns that it names; `sources`: the templates among the keys.

    Raises SpecError with key, column, file and the nearest name.
    """
    names = inputs.schema.names
    for key, columns in needed.items():
        for column in sorted(columns):
            if column not in names:
                hint = spelling(sources.get(key, ""), names) or suggest(column, names)
                raise SpecError(
                    f"column {column!r} is not in {inputs.files[0].url}{hint} (columns: {', '.join(names)})",
                    key=key,
                )


def check_type(key: str, column: str, inputs: Inputs, allowed: str) -> None:
    """Refuse a column whose every row would fail. `allowed`: letters of t(ext), i(d list), l(ist), m(apping)."""
    kind = inputs.schema.field(column).type
    if pa.types.is_null(kind) and "m" in allowed:
        return  # no row has an override
    if pa.types.is_null(kind):
        raise InputError(f"column {column!r} of {inputs.files[0].url} holds nothing but nulls", key=key)
    kind = row_type(kind)
    fits = {
        "t": is_text(kind),
        "i": is_listed(kind) and pa.types.is_integer(kind.value_type),
        "l": is_listed(kind),
        "m": pa.types.is_struct(kind) or pa.types.is_map(kind),
    }
    if not any(fits[letter] for letter in allowed):
        words = {"t": "text", "i": "lists of token ids", "l": "lists", "m": "mappings"}
        wanted = " or ".join(words[letter] for letter in allowed)
        raise InputError(f"column {column!r} of {inputs.files[0].url} has type {kind}; it must hold {wanted}", key=key)


def _rows_per_chunk(file: InputFile, asked: int) -> int:
    factor = _EXPANSION.get(file.format, 1)
    for ending in (".gz", ".zst"):
        if file.url.endswith(ending):
            factor = _EXPANSION[ending]
    row_bytes = max(1, file.size * factor // max(1, file.rows))
    return max(1, min(asked, CHUNK_BYTES // row_bytes))


def _files_hash(inputs: Inputs) -> str:
    whole = hashlib.sha256()
    for file in inputs.files:
        whole.update(repr(_identity(file)).encode())
    whole.update(inputs.schema.serialize().to_pybytes())
    rows = sum(file.rows for file in inputs.files)
    return f"{len(inputs.files)} files, {rows} rows, {whole.hexdigest()[:32]}"


def _identity(file: InputFile) -> tuple[Any, ...]:
    """Return what identifies a file; a local file may have another name or place, on another machine say."""
    place = file.url if local_path(file.url) is None else ""
    return place, file.format, file.size, file.content, file.rows, file.partitions


def _first_change(ours: tuple[InputFile, ...], theirs: tuple[InputFile, ...]) -> str:
    here, before = set(map(_identity, ours)), set(map(_identity, theirs))
    gone = {file.url: file for file in theirs if _identity(file) not in here}
    for place, file in enumerate(ours):
        if _identity(file) in before:
            continue
        was = gone.get(file.url) or (gone.get(theirs[place].url) if len(ours) == len(theirs) else None)
        if was is None:
            return f"{file.url} is new"
        if was.partitions != file.partitions and was.content == file.content:
            return f"{file.url} is of partition {dict(file.partitions)}, and was of {dict(was.partitions)}"
        sizes = f"{was.size} bytes then, {file.size} now"
        how = sizes if was.size != file.size else f"{sizes} too, with other content"
        return f"{file.url} changed since the output was begun ({how})"
    return f"{next(iter(gone))} is gone" if gone else "their order, number or columns changed"
