"""Results of rows, and the lines that hold them in spool and salvage: one JSON object per row, the fields of RowResult.

`encode_result` and `decode_results` are the only places that know the form. Logprobs are kept as JSON has them, one
`[token, logprob, [[token, logprob], …]]` per token, or null: there may be thousands per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from batchinfer.request import TokenLogprob

PlainLogprobs = list[list[Any] | None]


class RowSample(NamedTuple):
    """Sample of a row. `text` is None if the part from which it was read does not hold the sample's answer."""

    text: str | None
    finish_reason: str | None
    tokens: int
    ids: list[int] | None = None
    logprobs: PlainLogprobs | None = None


class RowFailure(NamedTuple):
    """Error of a row. `param`: the request's field at fault, for openai-batch rows."""

    kind: str
    message: str
    param: str | None = None


class RowResult(NamedTuple):
    """A finished row: samples, or the columns of a task that scores or embeds, or a failure.

    offset: counts from the first row of the chunk. columns: values of the task's own columns. scored_tokens: of
    continuations and texts, for the totals. response: JSON text of the answer to an openai-batch row, if the output
    has a place for it; see `openai_lines`.
    """

    offset: int
    prompt_tokens: int
    samples: list[RowSample] = []  # noqa: RUF012 - a default is never changed
    failure: RowFailure | None = None
    prompt_ids: list[int] | None = None
    prompt_logprobs: PlainLogprobs | None = None
    columns: dict[str, Any] = {}  # noqa: RUF012
    scored_tokens: int = 0
    response: str | None = None


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


_RARE = RowResult._fields[4:]
_DEFAULTS = RowResult._field_defaults


def encode_result(result: RowResult) -> bytes:
    """Return a result as a line, without its newline."""
    # millions of lines: fields that have their default are left out
    values: dict[str, Any] = {"offset": result.offset, "prompt_tokens": result.prompt_tokens}
    values["samples"] = [sample._asdict() for sample in result.samples]
    if result.failure is not None:
        values["failure"] = result.failure._asdict()
    rare = zip(_RARE, result[-len(_RARE) :], strict=True)
    values |= {name: value for name, value in rare if value is not None and value != _DEFAULTS[name]}
    try:
        return orjson.dumps(values)
    except TypeError:  # half of a surrogate pair
        return orjson.dumps(_encodable(values))


def decode_results(lines: bytes) -> list[RowResult]:
    """Return the results of these lines, by offset. Raises ValueError or TypeError for damaged lines."""
    values = orjson.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]")
    return sorted(map(_decoded, values), key=lambda result: result.offset)


def _decoded(values: dict[str, Any]) -> RowResult:
    if "samples" not in values:  # raises TypeError for what is no object
        raise ValueError("a line is not a result")
    values["samples"] = [RowSample(**sample) for sample in values["samples"]]
    if "failure" in values:
        values["failure"] = RowFailure(**values["failure"])
    return RowResult(**values)


def without_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which neither UTF-8 nor a text column can hold."""
    return text.encode("utf-8", "replace").decode()


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, dict):
        return {name: _encodable(item) for name, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value


def plain_logprobs(entries: Sequence[TokenLogprob | None]) -> PlainLogprobs:
    """Return logprobs as lines hold them; None where nobody asked for those of a token."""
    return [entry and [entry.token_id, entry.logprob, [list(pair) for pair in entry.top]] for entry in entries]


def count_results(results: Iterable[RowResult], exploded: bool) -> RowCounts:
    """Return the totals of results. exploded: each sample is a row of the output."""
    results = list(results)
    errors = Counter(result.failure.kind for result in results if result.failure is not None)
    return RowCounts(
        rows=len(results),
        output_rows=sum(len(result.samples) or 1 for result in results) if exploded else len(results),
        ok=len(results) - errors.total(),
        errors=dict(sorted(errors.items())),
        prompt_tokens=sum(result.prompt_tokens for result in results),
        completion_tokens=sum(sample.tokens for result in results for sample in result.samples),
        scored_tokens=sum(result.scored_tokens for result in results),
    )
