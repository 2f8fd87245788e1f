"""Results: one line per finished row in spool and salvage, and the table of a part made from them.

A line is JSON: [offset, prompt_tokens, prompt_ids|null, [[text, finish_reason, tokens, ids|null, logprobs|null], …],
error|null], and a sixth value, `read`, where the task reads. `offset` counts from the chunk's first row, an error is
[kind, message], logprobs are [[token, logprob, [[token, logprob], …]], …], and `read` maps the columns of the task to
their values, and `scored_tokens` to how many were. Of an openai-batch line an error may have the field at fault as
well, and `read` has what is known of its `prompts`: [[ids, logprobs|null, embedding|null], …], and how many of their
tokens were `cached`. All columns of a part are built a column at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from batchinfer.io.json_text import replace_nonfinite
from batchinfer.io.types import fit_to_type
from batchinfer.job.columns import BODY, ERROR, OK, READ_COLUMNS, OutputLayout
from batchinfer.openai.sampling_fields import error_param
from batchinfer.request import Completion, CompletionOutput, TokenLogprob

_OF_PROMPT = "prompt_logprobs"
SCORED = "scored_tokens"  # no column: what `read` counts for the totals
_READ_NAMES = [name for names in READ_COLUMNS.values() for name in names]
Sample = tuple[str | None, str | None, int, list[int] | None, list[Any] | None]


class Row(NamedTuple):
    """A finished row, as a line holds it. A sample without a text stands for what the columns of a part do not hold."""

    offset: int
    prompt_tokens: int
    prompt_ids: list[int] | None
    samples: list[Sample]
    error: list[str] | None
    read: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Totals of finished rows."""

    rows: int = 0
    output_rows: int = 0
    ok: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0


class ResultEncoder:
    """Completions into lines; keeps ids and logprobs only where the output or a line's answer has a place for them."""

    def __init__(self, layout: OutputLayout) -> None:
        self._ids = layout.has("prompt_token_ids")
        self._lines = layout.format == "openai-batch" or layout.has(BODY)
        self._logprobs = layout.has("logprobs") or self._lines
        self._of_prompt = layout.has(_OF_PROMPT)

    def line(self, offset: int, completion: Completion, shows_ids: bool = False) -> bytes:
        """shows_ids: the row is a request whose answer has token ids."""
        prompt = completion.prompt_token_ids
        ids = prompt if self._ids else None
        error = completion.error
        if error is not None:
            param = error_param(error) if self._lines else None
            why = (error.kind, str(error)) if param is None else (error.kind, str(error), param)
            return _dumps((offset, len(prompt), ids, (), why))
        samples = [self._sample(output, shows_ids) for output in completion.outputs]
        read = _prompts(completion, shows_ids) if self._lines else self._read(completion)
        return encode_row(Row(offset, len(prompt), ids, samples, None, read))

    def _read(self, completion: Completion) -> dict[str, Any] | None:
        if not self._of_prompt or completion.prompt_logprobs is None:
            return _read(completion)
        return {_OF_PROMPT: [entry and _plain(entry) for entry in completion.prompt_logprobs]}

    def _sample(self, output: CompletionOutput, shows_ids: bool) -> Sample:
        ids = output.token_ids
        logprobs = None
        if self._logprobs and output.logprobs is not None:
            logprobs = [_plain(entry) for entry in output.logprobs]
        return output.text, output.finish_reason, len(ids), ids if self._ids or shows_ids else None, logprobs


def _read(completion: Completion) -> dict[str, Any] | None:
    """Values of the columns of all tasks that read; the layout takes those of its own."""
    if completion.embedding is not None:
        return {"embedding": completion.embedding}
    scores = completion.scores
    if scores is None:
        return None
    first = scores[0]
    read: dict[str, Any] = {"logprob": first.logprob, "num_tokens": len(first.token_ids), "is_greedy": first.is_greedy}
    if completion.choice is not None:
        choice = completion.choice
        read |= {"choice": scores[choice].text, "choice_index": choice, "scores": [score.logprob for score in scores]}
    return {**read, SCORED: sum(len(score.token_ids) for score in scores)}


def _prompts(completion: Completion, shows_ids: bool) -> dict[str, Any] | None:
    """What the answer of an openai-batch line tells of its prompts, if it is anything."""
    read: dict[str, Any] = {"cached": completion.cached_tokens} if completion.cached_tokens else {}
    parts = completion.per_content or [completion]
    if shows_ids or any(part.prompt_logprobs is not None or part.embedding is not None for part in parts):
        read["prompts"] = [_prompt(part, shows_ids) for part in parts]
    return read or None


def _prompt(part: Completion, shows_ids: bool) -> list[Any]:
    entries = part.prompt_logprobs
    if entries is None:
        return [part.prompt_token_ids if shows_ids else [], None, part.embedding]
    return [part.prompt_token_ids, [entry and _plain(entry) for entry in entries], part.embedding]


def _plain(entry: TokenLogprob) -> list[Any]:
    return [entry.token_id, entry.logprob, [list(pair) for pair in entry.top]]


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, which no text column can hold
        return orjson.dumps(_encodable(value))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


def decode(lines: bytes) -> list[Row]:
    """Rows by offset. Raises ValueError for damaged lines."""
    values = orjson.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]")
    return sorted((Row(*value) for value in values), key=lambda row: row.offset)


def count(rows: Iterable[Row], exploded: bool) -> RowCounts:
    rows = list(rows)
    errors = Counter(row.error[0] for row in rows if row.error is not None)
    samples = [sample for row in rows for sample in row.samples]
    return RowCounts(
        rows=len(rows),
        output_rows=sum(len(row.samples) or 1 for row in rows) if exploded else len(rows),
        ok=len(rows) - errors.total(),
        errors=dict(sorted(errors.items())),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        completion_tokens=sum(sample[2] for sample in samples),
        scored_tokens=sum((row.read or {}).get(SCORED, 0) for row in rows),
    )


def build_table(layout: OutputLayout, rows: list[Row], carried: pa.Table, first_row: int) -> pa.Table:
    """The part of a chunk. `carried` holds the input columns of the same rows in the same order.

    `first_row` is the ordinal of offset 0 in the input file.
    """
    if layout.exploded:
        repeats = [place for place, row in enumerate(rows) for _ in row.samples or (None,)]
        carried = carried.take(pa.array(repeats, pa.int64()))
        numbers = [number for row in rows for number in range(len(row.samples) or 1)]
        rows = [each for row in rows for each in _single_samples(row)]
    else:
        numbers = []
    values = _added_values(layout, rows, first_row) | {"sample": numbers}
    columns = [_as_written(layout, name, carried.column(name)) for name in layout.carried]
    added = list(layout.schema)[len(columns) :]
    columns += [pa.array(values[entry.name.removeprefix(layout.prefix)], entry.type) for entry in added]
    if layout.format == "parquet":
        return pa.table(columns, schema=layout.schema)
    return pa.table(columns, names=layout.schema.names)


def _as_written(layout: OutputLayout, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """An input column as a part has it: lines keep each file's own type, Parquet has one for all parts."""
    kind = layout.schema.field(name).type if layout.format == "parquet" else column.type
    if name in layout.text_json and pa.types.is_string(column.type):
        return column.cast(kind) if pa.types.is_floating(kind) else fit_to_type(replace_nonfinite(column), kind)
    return fit_to_type(column, kind)


def _single_samples(row: Row) -> list[Row]:
    """What the body of a whole answer stands beside is the first."""
    return [
        row._replace(samples=[sample], read=row.read if number == 0 else _less_body(row.read))
        for number, sample in enumerate(row.samples)
    ] or [row]


def _less_body(read: dict[str, Any] | None) -> dict[str, Any] | None:
    return read and {name: value for name, value in read.items() if name != BODY}


def _added_values(layout: OutputLayout, rows: list[Row], first_row: int) -> dict[str, list[Any]]:
    failed = [row.error is not None for row in rows]
    values: dict[str, list[Any]] = {
        "row": [first_row + row.offset for row in rows],
        "prompt_tokens": [row.prompt_tokens for row in rows],
        "completion_tokens": [sum([sample[2] for sample in row.samples]) for row in rows],
        "status": [ERROR if bad else OK for bad in failed],
        "error_type": [row.error[0] if row.error else None for row in rows],
        "error": [row.error[1] if row.error else None for row in rows],
        "response": _per_sample(layout, rows, 0),
        "finish_reason": _per_sample(layout, rows, 1),
    }
    for name in filter(layout.has, _READ_NAMES):
        values[name] = [row.read[name] if row.read is not None else None for row in rows]
    if layout.has("prompt_token_ids"):
        values["prompt_token_ids"] = [row.prompt_ids for row in rows]
    if layout.has("token_ids"):
        values["token_ids"] = _per_sample(layout, rows, 3)
    if layout.has("logprobs"):
        values["logprobs"] = [_logprobs_text(layout, row) for row in rows]
    if layout.has(_OF_PROMPT):
        values[_OF_PROMPT] = [_prompt_text(row) for row in rows]
    if layout.has(BODY):
        values[BODY] = [(row.read or {}).get(BODY) for row in rows]
    return values


def _held(layout: OutputLayout, row: Row) -> list[Sample] | None:
    """The samples of a row that columns of texts hold: all, or one."""
    samples = row.samples
    return samples if samples and samples[0][0] is not None and (layout.listed or len(samples) == 1) else None


def _per_sample(layout: OutputLayout, rows: list[Row], place: int) -> list[Any]:
    held = [_held(layout, row) for row in rows]
    if layout.listed:
        return [None if samples is None else [sample[place] for sample in samples] for samples in held]
    return [None if samples is None else samples[0][place] for samples in held]


def _logprobs_text(layout: OutputLayout, row: Row) -> str | None:
    """JSON: per token {token_id, logprob, top: [{token_id, logprob}, …]}; a list of these with n > 1."""
    lists = [_logprob_values(sample[4]) for sample in _held(layout, row) or ()]
    if not any(entry is not None for entry in lists):
        return None
    return orjson.dumps(lists if layout.listed else lists[0]).decode()


def _prompt_text(row: Row) -> str | None:
    """The same for the prompt's tokens: null for the first."""
    read = row.read or {}
    entries = read.get(_OF_PROMPT)
    if len(read.get("prompts", ())) == 1:
        entries = read["prompts"][0][1]
    return None if entries is None else orjson.dumps(_logprob_values(entries)).decode()


def _logprob_values(logprobs: list[Any] | None) -> list[dict[str, Any] | None] | None:
    return None if logprobs is None else [entry and _named(*entry) for entry in logprobs]


def _named(token: int, logprob: float, top: list[Any]) -> dict[str, Any]:
    best = [{"token_id": other, "logprob": value} for other, value in top]
    return {"token_id": token, "logprob": logprob, "top": best}


def rows_of_part(layout: OutputLayout, values: Iterable[dict[str, Any]], first_row: int) -> list[Row]:
    """The results that a part's rows hold: the inverse of `build_table`, for a retry that keeps most of them.

    Token counts of the samples of one row are known only in sum: the first sample carries it.
    """
    rows: dict[int, Row] = {}
    for named in values:
        value = {name.removeprefix(layout.prefix): cell for name, cell in named.items() if name not in layout.carried}
        offset = value["row"] - first_row
        error = [value["error_type"], value["error"]] if value["status"] == ERROR else None
        read = None if error else {name: value[name] for name in filter(layout.has, _READ_NAMES)} or None
        samples = [] if error or read else _samples(layout, value)
        if samples and value.get(_OF_PROMPT) is not None:
            read = {_OF_PROMPT: _line_logprobs(_loaded(value[_OF_PROMPT]))}
        if value.get(BODY) is not None:
            read = {**(read or {}), BODY: _as_json(value[BODY])}
        if offset in rows:
            rows[offset].samples.extend(samples)
        else:
            rows[offset] = Row(offset, value["prompt_tokens"], value.get("prompt_token_ids"), samples, error, read)
    return [rows[offset] for offset in sorted(rows)]


def _samples(layout: OutputLayout, value: dict[str, Any]) -> list[Sample]:
    lists = _loaded(value.get("logprobs"))
    if not layout.listed or value["response"] is None:
        tokens, ids = value["completion_tokens"], value.get("token_ids")
        return [(value["response"], value["finish_reason"], tokens, ids, _line_logprobs(lists))]
    samples: list[Sample] = []
    for number, text in enumerate(value["response"]):
        ids = value["token_ids"][number] if value.get("token_ids") else None
        tokens = value["completion_tokens"] if number == 0 else 0
        own = _line_logprobs(lists[number]) if lists else None
        samples.append((text, value["finish_reason"][number], tokens, ids, own))
    return samples


def _loaded(cell: Any) -> Any:
    """A cell of JSON, which is text in Parquet and a value in lines."""
    return orjson.loads(cell) if isinstance(cell, str) else cell


def _as_json(cell: Any) -> str:
    return cell if isinstance(cell, str) else orjson.dumps(cell).decode()


def _line_logprobs(values: list[dict[str, Any] | None] | None) -> list[Any] | None:
    if values is None:
        return None
    return [
        entry and [entry["token_id"], entry["logprob"], [[top["token_id"], top["logprob"]] for top in entry["top"]]]
        for entry in values
    ]


def encode_row(row: Row) -> bytes:
    return _dumps(tuple(row) if row.read is not None else row[:5])
