"""Responses to openai-batch rows: lines as OpenAI's batch endpoint returns them, or bodies as cells of a column.

Nothing in them depends on the time: `created` is 0, ids follow from the row. Only `cached_tokens`, how much of a prompt
the prefix cache held, depends on what ran before. `batchinfer.openai` writes the bodies,
here as for the endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pyarrow as pa

from batchinfer.job.columns import BODY, OutputLayout
from batchinfer.job.results import Row
from batchinfer.job.row_prompts import parse_line
from batchinfer.openai.json_text import dump_json
from batchinfer.openai.parse import ModelFacts, ParsedRequest, route_field
from batchinfer.openai.request_models import CompletionRequest
from batchinfer.openai.response_bodies import (
    PromptResult,
    PromptTokenCounts,
    ResponseBodies,
    SampleResult,
    error_response,
    usage_tokens,
)
from batchinfer.request import FinishReason, TokenLogprob

_ID = "batch_req_"


def build_lines(layout: OutputLayout, rows: list[Row], carried: pa.Table, base: int, model: ModelFacts) -> pa.Table:
    """The part of a chunk. `carried` has the requests of the same rows; `base` is the job's index of offset 0."""
    ids = [base + row.offset for row in rows]
    bodies = ResponseBodies(model)
    columns = {
        "id": [f"{_ID}{number:09d}" for number in ids],
        "custom_id": carried.column("custom_id").to_pylist(),
        "response": [
            dump_json(_response(row, number, line, bodies, model)).decode()
            for row, number, line in zip(rows, ids, carried.to_pylist(), strict=True)
        ],
        "error": [dump_json(_error(row)).decode() if row.error else None for row in rows],
    }
    return pa.table(columns, schema=layout.schema)


def with_bodies(layout: OutputLayout, rows: list[Row], carried: pa.Table, base: int, model: ModelFacts) -> list[Row]:
    """The rows of a table of openai-batch input; those whose answer is more than the columns hold have its body."""
    if not layout.has(BODY):
        return rows
    bodies = ResponseBodies(model)
    requests = carried.select(["url", "body"]).to_pylist()
    made = []
    for row, line in zip(rows, requests, strict=True):
        if row.error is None and BODY not in (row.read or {}):  # one that a retry keeps may have it
            made.append(_with_body(layout, row, base, parse_line(line, model), bodies))
        else:
            made.append(row)
    return made


def _with_body(layout: OutputLayout, row: Row, base: int, asked: ParsedRequest, bodies: ResponseBodies) -> Row:
    echoes = isinstance(asked.body, CompletionRequest) and bool(asked.body.echo)
    no_place = len(row.samples) > 1 and not (layout.listed or layout.exploded)
    if not (no_place or echoes or asked.returns_token_ids or asked.pooling is not None or asked.tool_use is not None):
        return row
    body = dump_json(_answer(row, base + row.offset, asked, bodies)).decode()
    return row._replace(read={**(row.read or {}), BODY: body})


def rows_of_lines(lines: Iterable[dict[str, Any]], base: int) -> list[Row]:
    """The inverse of `build_lines`. The response of a row that was answered stays as it is."""
    rows = []
    for line in lines:
        offset = int(line["id"].removeprefix(_ID)) - base
        body, failed = line["response"]["body"], line["error"]
        prompt_tokens, answer_tokens = usage_tokens(body["usage"])
        if failed is not None:
            param = body["error"]["param"]
            why = [failed["code"], failed["message"], *([] if param is None else [param])]
            rows.append(Row(offset, prompt_tokens, None, [], why))
            continue
        sample = ("", "stop", answer_tokens, None, None)
        rows.append(Row(offset, prompt_tokens, None, [sample], None, {"response": line["response"]}))
    return sorted(rows, key=lambda row: row.offset)


def _response(row: Row, number: int, line: dict[str, Any], bodies: ResponseBodies, model: ModelFacts) -> dict[str, Any]:
    read = row.read or {}
    if "response" in read:
        kept: dict[str, Any] = read["response"]
        return kept
    if row.error is not None:
        kind, message, *param = row.error
        named = route_field(line["url"], param[0] if param else None)
        status, body = error_response(kind, message, named, row.prompt_tokens)
    else:
        status, body = 200, _answer(row, number, parse_line(line, model), bodies)
    return {"status_code": status, "request_id": f"req_{number:09d}", "body": body}


def _answer(row: Row, number: int, asked: ParsedRequest, bodies: ResponseBodies) -> dict[str, Any]:
    read = row.read or {}
    known = read.get("prompts") or [[[], None, None]] * len(asked.contents)
    prompts = [PromptResult(ids, _entries(logprobs), vector) for ids, logprobs, vector in known]
    said = [
        SampleResult(cast(str, text), cast(FinishReason, reason), tokens, ids, _entries(logprobs))
        for text, reason, tokens, ids, logprobs in row.samples
    ]
    return bodies.build_body(asked, number, PromptTokenCounts(row.prompt_tokens, read.get("cached", 0)), prompts, said)


def _error(row: Row) -> dict[str, str]:
    kind, message, *_ = row.error or ["", ""]
    return {"code": kind, "message": message}


def _entries(values: list[Any] | None) -> list[Any] | None:
    """Entries of logprobs from their plain form; None where nothing precedes a token."""
    if values is None:
        return None
    return [None if value is None else _entry(*value) for value in values]


def _entry(token: int, logprob: float, top: list[Any]) -> TokenLogprob:
    return TokenLogprob(token, logprob, tuple((other, value) for other, value in top))
