"""The audit of parts: their bytes against commit records, their rows against the input."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from batchinfer.errors import BatchInferError, InputMissing, OutputConflict, RowError, UserError
from batchinfer.io.json_text import replace_nonfinite
from batchinfer.io.rows import Inputs, RowBatch, RowSpan, rows_of, stream_rows
from batchinfer.io.storage import Store
from batchinfer.job.inspect.verify_commits import Commits
from batchinfer.job.inspect.verify_report import Audit, Chunk, Difference, PlannedOutput, Record, name_rows
from batchinfer.job.part_reader import read_part
from batchinfer.job.plan import load_plan
from batchinfer.job.prefetch import ahead
from batchinfer.job.same_inputs import same_inputs
from batchinfer.openai.response_bodies import usage_tokens
from batchinfer.spec import JobSpec, StorageSpec
from batchinfer.text.row_template import RowFilter

_ADDED = ("row", "status", "error_type", "prompt_tokens", "completion_tokens", "sample")
_PARTS_AT_ONCE = 16
_PART_BYTES = 16 << 20  # a larger part counts as several


class Reach(NamedTuple):
    """Access to the input. `spec`: a job file that says where it is now; None: where the run read it."""

    storage: StorageSpec
    spec: JobSpec | None


class _PartRow(NamedTuple):
    """A row of a part, as far as it is checked. `carried`: its input columns."""

    row: int
    sample: int
    ok: bool
    error_type: str | None
    prompt_tokens: int
    completion_tokens: int
    carried: dict[str, Any]


def check_parts(store: Store, reach: Reach, layout: PlannedOutput, commits: Commits, result: Audit) -> None:
    """Compare every part with its record and the input. Parts are prefetched, several at once."""
    source = _Source(store, reach, layout, [layout.chunks[number] for number in commits.chosen], result)

    def load(item: tuple[int, Record | None]) -> _Part:
        record = item[1]
        data = store.read(record.part) if record is not None and record.part is not None else None
        return _Part(layout.chunks[item[0]], record, data, hashlib.sha256(data or b"").hexdigest())

    for part in ahead(load, commits.in_effect(), _PARTS_AT_ONCE, _cost):
        wanted = source.next_chunk(part.chunk)
        if part.record is None:
            continue
        result.chunks += 1
        found = _part_rows(part, part.record, _RowReader(part.chunk, layout, source.compared), result)
        if found is None:
            continue
        if wanted is not None:
            _check_rows(part.record.part or part.record.name, part.chunk, wanted, found, result)
        _check_counts(part.record, found, result)


class _Part(NamedTuple):
    """A chunk's part as it was read: None where there is none."""

    chunk: Chunk
    record: Record | None
    data: bytes | None
    sha256: str


def _cost(item: tuple[int, Record | None]) -> int:
    """Return the cost of a part, in sixteenths of the memory that waiting parts may take."""
    return 1 if item[1] is None else 1 + max(0, item[1].values.get("bytes", 0)) // _PART_BYTES


def _part_rows(part: _Part, record: Record, reader: _RowReader, result: Audit) -> list[_PartRow] | None:
    """Compare the part's size and hash with its record and return its rows; None if it cannot be read."""
    if record.part is None:
        return []
    data = part.data
    if data is None:
        result.note(record.part, f"missing, and {record.name} names it")
        return None
    result.parts += 1
    result.bytes += len(data)
    if len(data) != record.values.get("bytes"):
        result.note(record.part, f"has {len(data)} bytes, and {record.name} says {record.values.get('bytes')}")
    elif part.sha256 != record.values.get("sha256"):
        result.note(record.part, f"was altered: its sha256 is not that of {record.name}")
    try:
        return reader.rows(data, record.part)
    except OutputConflict as error:
        result.differences.append(Difference(record.part, str(error).partition(": ")[2]))
    except (KeyError, TypeError, ValueError) as error:
        result.note(record.part, f"a row lacks what it should have: {error!r}")
    return None


@dataclass(frozen=True, slots=True)
class _RowReader:
    """Reads the parts of one chunk. `compared`: the input columns whose values are looked at."""

    chunk: Chunk
    layout: PlannedOutput
    compared: tuple[str, ...]

    def rows(self, data: bytes, name: str) -> list[_PartRow]:
        """Read a part. Raises OutputConflict, or KeyError, TypeError or ValueError for rows that are not ours."""
        if self.layout.format == "openai-batch":
            return [self._batch_line(row) for row in read_part(data, name)]
        added = [self.layout.prefix + name for name in _ADDED]
        wanted = [*added, *self.compared, *self.layout.of_file(self.chunk)]
        return [self._table_row(row) for row in read_part(data, name, wanted)]

    def _table_row(self, row: dict[str, Any]) -> _PartRow:
        number, status, error_type, prompt, completion = [row.pop(self.layout.prefix + name) for name in _ADDED[:5]]
        sample = row.pop(self.layout.prefix + "sample") if self.layout.exploded else 0
        if status not in ("ok", "error") or (status == "ok") != (error_type is None):
            raise ValueError(f"row {number} has status {status!r} and error_type {error_type!r}")
        return _PartRow(int(number), int(sample), status == "ok", error_type, prompt, completion, row)

    def _batch_line(self, row: dict[str, Any]) -> _PartRow:
        """Read a response line of OpenAI's batch format; its id carries the row's index in the job."""
        number = int(row["id"].rpartition("_")[2]) - self.chunk.base + self.chunk.start
        tokens, error = usage_tokens(row["response"]["body"]["usage"]), row["error"]
        carried = {"custom_id": row["custom_id"]}
        return _PartRow(number, 0, error is None, error and error["code"], *tokens, carried)


def _check_rows(where: str, chunk: Chunk, wanted: _Wanted, found: list[_PartRow], result: Audit) -> None:
    """Compare: every wanted row stands there once, with the input's own values."""
    samples: dict[int, list[int]] = {}
    for row in found:
        samples.setdefault(row.row, []).append(row.sample)
    doubled = [row for row, numbers in samples.items() if sorted(numbers) != list(range(len(numbers)))]
    missing = wanted.rows - samples.keys()
    strange = samples.keys() - wanted.rows
    result.rows += len(wanted.rows) - len(missing) - len(wanted.rows.intersection(doubled))
    for rows, what in ((missing, "has no output for"), (doubled, "has more than one output for")):
        if rows:
            result.note(where, f"{what} rows {name_rows(rows)} of {chunk.url}")
    if strange:
        result.note(where, f"has rows {name_rows(strange)} of {chunk.url}, which are not the job's or not this chunk's")
    for row in found:
        theirs = wanted.values.get(row.row, {})
        for column in theirs.keys() & row.carried.keys():
            if not _same(theirs[column], row.carried[column]):
                result.note(where, f"row {row.row}: column {column!r} is not what {chunk.url} has there")


def _same(theirs: Any, ours: Any) -> bool:
    return bool(theirs == ours or (theirs != theirs and ours != ours))  # two NaN are the same here


def _check_counts(record: Record, found: list[_PartRow], result: Audit) -> None:
    rows = [row for row in found if row.sample == 0]
    errors = Counter(row.error_type for row in rows if not row.ok)
    counted: dict[str, Any] = {
        "rows": len(rows),
        "output_rows": len(found),
        "ok": len(rows) - errors.total(),
        "errors": dict(errors),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "completion_tokens": sum(row.completion_tokens for row in found),
    }
    for name, value in counted.items():
        if record.values.get(name) != value:
            where = record.part or record.name
            result.note(where, f"{name} is {value}, and {record.name} says {record.values.get(name)}")


# -- inputs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The rows of a chunk that the output must have, and their input values (empty if they could not be read)."""

    rows: set[int]
    values: dict[int, dict[str, Any]]


class _Source:
    """The input, read once from beginning to end; a file that is gone or changed is a difference, and ends it."""

    def __init__(self, store: Store, reach: Reach, layout: PlannedOutput, chunks: list[Chunk], result: Audit) -> None:
        self.compared: tuple[str, ...] = ()
        self._layout = layout
        self._lost = reach.spec is None
        self._result = result
        self._text_json: frozenset[str] = frozenset()
        self._judged: frozenset[str] = frozenset()
        self._filter = RowFilter(layout.where) if layout.where is not None else None
        self._batches: Iterator[tuple[RowSpan, RowBatch]] = iter(())
        try:
            inputs = _inputs(store, reach.spec)
            self._text_json = inputs.text_json
            self.compared = tuple(name for name in inputs.schema.names if _plain(inputs, name, layout.lines))
            self._judged = self._filter.columns(inputs.schema.names) if self._filter else frozenset()
            read = {*self.compared, *self._judged}
            spans = [RowSpan(chunk.file, chunk.start, chunk.stop - chunk.start) for chunk in chunks]
            self._batches = stream_rows(inputs.select(read), spans, reach.storage)
        except BatchInferError as error:
            self._fail(error)

    def next_chunk(self, chunk: Chunk) -> _Wanted | None:
        """Return the wanted rows of the next chunk; None if it is not known which rows it should have."""
        try:
            _, batch = next(self._batches)
        except StopIteration:
            return None if self._filter else _Wanted(set(range(chunk.start, chunk.stop)), {})
        except BatchInferError as error:
            self._fail(error)
            return self.next_chunk(chunk)
        kept = self._kept(batch)
        file = self._layout.of_file(chunk)
        values = rows_of(self._as_written(batch.table), self.compared)
        return _Wanted({chunk.start + offset for offset in kept}, {chunk.start + o: values[o] | file for o in kept})

    def _as_written(self, table: pa.Table) -> pa.Table:
        for name in self._text_json.intersection(self.compared):
            table = table.set_column(table.column_names.index(name), name, replace_nonfinite(table.column(name)))
        return table

    def _kept(self, batch: RowBatch) -> Iterable[int]:
        """Offsets of the selected rows; one that `where` cannot judge must be seen as an error row."""
        if self._filter is None:
            return range(batch.table.num_rows)
        unjudged = batch.without(self._judged)
        kept = list(unjudged)
        names = [name for name in batch.table.column_names if name in self._judged]
        for offset, row in enumerate(rows_of(batch.table, names, self._text_json)):
            try:
                if offset not in unjudged and self._filter.matches(row):
                    kept.append(offset)
            except RowError:
                kept.append(offset)
        return kept

    def _fail(self, error: BatchInferError) -> None:
        self._batches = iter(())
        lost = isinstance(error, InputMissing) and self._lost
        hint = "; given its job file in place of the output, verify reads the input where that has it"
        self._result.note("input", f"{error}{hint if lost else ''}")


def _inputs(store: Store, spec: JobSpec | None) -> Inputs:
    """Return the plan's inputs, at the place that the job file names if the same files are there."""
    plan = load_plan(store)
    try:
        found = same_inputs(spec, plan) if spec is not None else None
    except UserError:
        found = None
    return found or plan.inputs


def _plain(inputs: Inputs, name: str, lines: bool) -> bool:
    """Return True if the output has this column's values unchanged: JSON changes dates, bytes and fractions."""
    kind = inputs.schema.field(name).type
    if name in inputs.text_json and (lines or not pa.types.is_string(kind)):
        return False
    numbers = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_floating(kind) and not lines)
    return numbers or pa.types.is_string(kind) or pa.types.is_large_string(kind)
