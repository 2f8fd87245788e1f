"""Responses to openai-batch rows: lines as OpenAI's batch endpoint returns them, or bodies as cells of a column.

Nothing in them depends on the time: `created` is 0, ids follow from the row. Only `cached_tokens`, how much of a prompt
the prefix cache held, depends on what ran before. `batchinfer.openai` writes the bodies, here as for the endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from batchinfer.job.columns import OutputLayout
from batchinfer.job.results import RowFailure, RowResult, RowSample
from batchinfer.job.row_prompts import LineRequest
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
from batchinfer.request import Completion

_ID = "batch_req_"


class ResponseWriter:
    """Writes the `response` of results, as JSON text.

    In openai-batch output that is the whole response of the line, for every row. In a table it is the response's body,
    for rows whose answer is more than the other columns hold.
    """

    def __init__(self, layout: OutputLayout, model: ModelFacts) -> None:
        self._layout = layout
        self._lines = layout.format == "openai-batch"
        self._bodies = ResponseBodies(model)

    def add_response(self, result: RowResult, number: int, parsed: ParsedRequest, completion: Completion) -> RowResult:
        """Return the result of a row that was answered with its response. number: the row's index in the job.

        The samples of openai-batch output keep only their token counts: everything else is in the response.
        """
        if not self._lines and self._columns_hold(parsed, completion):
            return result
        body = self._body(result, number, parsed, completion)
        if not self._lines:
            return result._replace(response=dump_json(body).decode())
        samples = [RowSample("", sample.finish_reason, sample.tokens) for sample in result.samples]
        return result._replace(samples=samples, response=dump_json(_response(number, 200, body)).decode())

    def _body(self, result: RowResult, number: int, parsed: ParsedRequest, completion: Completion) -> dict[str, Any]:
        returned = parsed.returns_token_ids
        prompts = [
            PromptResult(
                one.prompt_token_ids if returned or one.prompt_logprobs is not None else [],
                one.prompt_logprobs,
                one.embedding,
            )
            for one in completion.per_content or [completion]
        ]
        samples = [
            SampleResult(output.text, output.finish_reason, sample.tokens, sample.ids, output.logprobs)
            for output, sample in zip(completion.outputs, result.samples, strict=True)
        ]
        counted = PromptTokenCounts(result.prompt_tokens, completion.cached_tokens)
        return self._bodies.build_body(parsed, number, counted, prompts, samples)

    def write_failure(self, number: int, request: LineRequest, failure: RowFailure, prompt_tokens: int) -> str | None:
        """Return the response to a row that failed; a table has columns for that."""
        if not self._lines:
            return None
        param = route_field(request.url, failure.param)
        status, body = error_response(failure.kind, failure.message, param, prompt_tokens)
        return dump_json(_response(number, status, body)).decode()

    def _columns_hold(self, parsed: ParsedRequest, completion: Completion) -> bool:
        echoes = isinstance(parsed.body, CompletionRequest) and bool(parsed.body.echo)
        no_place = len(completion.outputs) > 1 and not (self._layout.listed or self._layout.exploded)
        special = parsed.returns_token_ids or parsed.pooling is not None or parsed.tool_use is not None
        return not (no_place or echoes or special)


def _response(number: int, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{number:09d}", "body": body}


def build_lines(layout: OutputLayout, results: list[RowResult], carried: pa.Table, base: int) -> pa.Table:
    """Return the part of a chunk. carried: `custom_id` of the same rows. base: index in the job of offset 0."""
    failures = [result.failure for result in results]
    columns = {
        "id": [f"{_ID}{base + result.offset:09d}" for result in results],
        "custom_id": carried.column("custom_id").to_pylist(),
        "response": [result.response for result in results],
        "error": [
            None if failure is None else dump_json({"code": failure.kind, "message": failure.message}).decode()
            for failure in failures
        ],
    }
    return pa.table(columns, schema=layout.schema)


def results_of_lines(lines: Iterable[dict[str, Any]], base: int) -> list[RowResult]:
    """Return the results that a part's lines hold: the inverse of `build_lines`. Responses stay as they are."""
    results = []
    for line in lines:
        offset = int(line["id"].removeprefix(_ID)) - base
        body, failed = line["response"]["body"], line["error"]
        response = dump_json(line["response"]).decode()
        prompt_tokens, answer_tokens = usage_tokens(body["usage"])
        if failed is not None:
            failure = RowFailure(failed["code"], failed["message"], body["error"]["param"])
            results.append(RowResult(offset, prompt_tokens, failure=failure, response=response))
        else:
            results.append(RowResult(offset, prompt_tokens, [RowSample("", "stop", answer_tokens)], response=response))
    return sorted(results, key=lambda result: result.offset)
