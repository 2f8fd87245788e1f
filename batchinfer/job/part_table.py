"""The table of a part made from results, a column at a time, and results read back from a part's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson
import pyarrow as pa

from batchinfer.io.json_text import replace_nonfinite
from batchinfer.io.types import fit_to_type
from batchinfer.job.columns import BODY, ERROR, OK, READ_COLUMNS, OutputLayout
from batchinfer.job.results import PlainLogprobs, RowFailure, RowResult, RowSample

_PROMPT_LOGPROBS = "prompt_logprobs"
_TASK_COLUMNS = [name for names in READ_COLUMNS.values() for name in names]


def build_table(layout: OutputLayout, results: list[RowResult], carried: pa.Table, first_row: int) -> pa.Table:
    """Return the part of a chunk. `carried` holds the input columns of the same rows in the same order.

    `first_row` is the ordinal of offset 0 in the input file.
    """
    if layout.exploded:
        repeats = [place for place, result in enumerate(results) for _ in result.samples or (None,)]
        carried = carried.take(pa.array(repeats, pa.int64()))
        numbers = [number for result in results for number in range(len(result.samples) or 1)]
        results = [each for result in results for each in _single_samples(result)]
    else:
        numbers = []
    values = _added_values(layout, results, first_row) | {"sample": numbers}
    columns = [_as_written(layout, name, carried.column(name)) for name in layout.carried]
    added = list(layout.schema)[len(columns) :]
    columns += [pa.array(values[entry.name.removeprefix(layout.prefix)], entry.type) for entry in added]
    if layout.format == "parquet":
        return pa.table(columns, schema=layout.schema)
    return pa.table(columns, names=layout.schema.names)


def _as_written(layout: OutputLayout, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return an input column as a part has it: JSON lines keep each file's own type, Parquet has one for all parts."""
    kind = layout.schema.field(name).type if layout.format == "parquet" else column.type
    if name in layout.text_json and pa.types.is_string(column.type):
        return column.cast(kind) if pa.types.is_floating(kind) else fit_to_type(replace_nonfinite(column), kind)
    return fit_to_type(column, kind)


def _single_samples(result: RowResult) -> list[RowResult]:
    """Return one result per sample; the response of the whole row stands beside the first."""
    return [
        result._replace(samples=[sample], response=result.response if number == 0 else None)
        for number, sample in enumerate(result.samples)
    ] or [result]


def _added_values(layout: OutputLayout, results: list[RowResult], first_row: int) -> dict[str, list[Any]]:
    failures = [result.failure for result in results]
    values: dict[str, list[Any]] = {
        "row": [first_row + result.offset for result in results],
        "prompt_tokens": [result.prompt_tokens for result in results],
        "completion_tokens": [sum([sample.tokens for sample in result.samples]) for result in results],
        "status": [OK if failure is None else ERROR for failure in failures],
        "error_type": [failure and failure.kind for failure in failures],
        "error": [failure and failure.message for failure in failures],
        "response": _per_sample(layout, results, lambda sample: sample.text),
        "finish_reason": _per_sample(layout, results, lambda sample: sample.finish_reason),
    }
    for name in filter(layout.has, _TASK_COLUMNS):
        values[name] = [result.columns.get(name) for result in results]
    if layout.has("prompt_token_ids"):
        values["prompt_token_ids"] = [result.prompt_ids for result in results]
    if layout.has("token_ids"):
        values["token_ids"] = _per_sample(layout, results, lambda sample: sample.ids)
    if layout.has("logprobs"):
        values["logprobs"] = [_logprobs_text(layout, result) for result in results]
    if layout.has(_PROMPT_LOGPROBS):
        values[_PROMPT_LOGPROBS] = [_prompt_logprobs_text(result) for result in results]
    if layout.has(BODY):
        values[BODY] = [result.response for result in results]
    return values


def _held_samples(layout: OutputLayout, result: RowResult) -> list[RowSample] | None:
    """Return the samples that the text columns hold: all, or one."""
    samples = result.samples
    held = samples and samples[0].text is not None and (layout.listed or len(samples) == 1)
    return samples if held else None


def _per_sample(layout: OutputLayout, results: list[RowResult], value: Callable[[RowSample], Any]) -> list[Any]:
    held = [_held_samples(layout, result) for result in results]
    if layout.listed:
        return [None if samples is None else [value(sample) for sample in samples] for samples in held]
    return [None if samples is None else value(samples[0]) for samples in held]


def _logprobs_text(layout: OutputLayout, result: RowResult) -> str | None:
    """Return JSON: per token {token_id, logprob, top: [{token_id, logprob}, …]}; a list of these with n > 1."""
    lists = [_named_logprobs(sample.logprobs) for sample in _held_samples(layout, result) or ()]
    if not any(entry is not None for entry in lists):
        return None
    return orjson.dumps(lists if layout.listed else lists[0]).decode()


def _prompt_logprobs_text(result: RowResult) -> str | None:
    """Return the same for the prompt's tokens: null for the first."""
    entries = result.prompt_logprobs
    return None if entries is None else orjson.dumps(_named_logprobs(entries)).decode()


def _named_logprobs(logprobs: PlainLogprobs | None) -> list[dict[str, Any] | None] | None:
    return None if logprobs is None else [None if entry is None else _named_logprob(*entry) for entry in logprobs]


def _named_logprob(token: int, logprob: float, top: list[Any]) -> dict[str, Any]:
    best = [{"token_id": other, "logprob": value} for other, value in top]
    return {"token_id": token, "logprob": logprob, "top": best}


# -- back from a part ---------------------------------------------------------------------------------------------


def results_of_part(layout: OutputLayout, rows: Iterable[dict[str, Any]], first_row: int) -> list[RowResult]:
    """Return the results that a part's rows hold: the inverse of `build_table`, for a retry that keeps most of them.

    Token counts of the samples of one row are known only in sum: the first sample carries it.
    """
    results: dict[int, RowResult] = {}
    for row in rows:
        value = {name.removeprefix(layout.prefix): cell for name, cell in row.items() if name not in layout.carried}
        offset = value["row"] - first_row
        failed = value["status"] == ERROR
        columns = {} if failed else {name: value[name] for name in filter(layout.has, _TASK_COLUMNS)}
        samples = [] if failed or columns else _samples_of_row(layout, value)
        if offset in results:
            results[offset].samples.extend(samples)
            continue
        entries = value.get(_PROMPT_LOGPROBS) if samples else None
        response = value.get(BODY)
        results[offset] = RowResult(
            offset,
            value["prompt_tokens"],
            samples,
            RowFailure(value["error_type"], value["error"]) if failed else None,
            value.get("prompt_token_ids"),
            None if entries is None else _plain_from_named(_json_value(entries)),
            columns,
            response=None if response is None else _json_text(response),
        )
    return [results[offset] for offset in sorted(results)]


def _samples_of_row(layout: OutputLayout, value: dict[str, Any]) -> list[RowSample]:
    lists = _json_value(value.get("logprobs"))
    if not layout.listed or value["response"] is None:
        tokens, ids = value["completion_tokens"], value.get("token_ids")
        return [RowSample(value["response"], value["finish_reason"], tokens, ids, _plain_from_named(lists))]
    samples: list[RowSample] = []
    for number, text in enumerate(value["response"]):
        ids = value["token_ids"][number] if value.get("token_ids") else None
        tokens = value["completion_tokens"] if number == 0 else 0
        own = _plain_from_named(lists[number]) if lists else None
        samples.append(RowSample(text, value["finish_reason"][number], tokens, ids, own))
    return samples


def _json_value(cell: Any) -> Any:
    """Return the value of a cell of JSON, which is text in Parquet and a value in lines."""
    return orjson.loads(cell) if isinstance(cell, str) else cell


def _json_text(cell: Any) -> str:
    return cell if isinstance(cell, str) else orjson.dumps(cell).decode()


def _plain_from_named(values: list[dict[str, Any] | None] | None) -> PlainLogprobs | None:
    return None if values is None else [None if entry is None else _plain_logprob(**entry) for entry in values]


def _plain_logprob(token_id: int, logprob: float, top: list[dict[str, Any]]) -> list[Any]:
    return [token_id, logprob, [[best["token_id"], best["logprob"]] for best in top]]
