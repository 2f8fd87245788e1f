"""Results of rows, made from their completions."""

from __future__ import annotations

from typing import Any

from batchinfer.errors import RowError
from batchinfer.job.columns import BODY, OutputLayout
from batchinfer.job.openai_lines import ResponseWriter
from batchinfer.job.results import RowFailure, RowResult, RowSample, plain_logprobs, without_surrogates
from batchinfer.job.row_prompts import LineRequest
from batchinfer.openai.parse import ModelFacts
from batchinfer.openai.sampling_fields import error_param
from batchinfer.request import Completion, CompletionOutput, Score


class ResultEncoder:
    """Makes results; keeps ids, logprobs and responses only if the output has a place for them.

    The response to an openai-batch row is written here, when the row ends: the request was parsed for the prompt, and
    nothing of it needs to be kept or parsed again for the commit or a resume.
    """

    def __init__(self, layout: OutputLayout, model: ModelFacts) -> None:
        """model: writes the responses of openai-batch rows."""
        self._ids = layout.has("prompt_token_ids")
        self._logprobs = layout.has("logprobs")
        self._prompt_logprobs = layout.has("prompt_logprobs")
        lines = layout.format == "openai-batch" or layout.has(BODY)
        self._responses = ResponseWriter(layout, model) if lines else None

    def result(self, offset: int, number: int, completion: Completion, request: LineRequest | None) -> RowResult:
        """Return the result of the row at `offset` of its chunk, whose index in the job is `number`.

        request: of an openai-batch row.
        """
        if completion.error is not None:
            return self._failed(offset, number, completion, completion.error, request)
        prompt = completion.prompt_token_ids
        entries = completion.prompt_logprobs if self._prompt_logprobs else None
        parsed = request.parsed if request is not None else None
        shows_ids = self._ids or (parsed is not None and parsed.returns_token_ids)
        result = RowResult(
            offset,
            len(prompt),
            [self._sample(output, shows_ids) for output in completion.outputs],
            prompt_ids=prompt if self._ids else None,
            prompt_logprobs=None if entries is None else plain_logprobs(entries),
        )
        if self._responses is not None and parsed is not None:
            return self._responses.add_response(result, number, parsed, completion)
        if completion.embedding is not None:
            return result._replace(columns={"embedding": completion.embedding})
        if completion.scores is not None:
            scored = sum(len(score.token_ids) for score in completion.scores)
            return result._replace(columns=_score_columns(completion.scores, completion.choice), scored_tokens=scored)
        return result

    def _failed(
        self, offset: int, number: int, completion: Completion, error: RowError, request: LineRequest | None
    ) -> RowResult:
        prompt = completion.prompt_token_ids
        failure = _failure(error, request is not None)
        response = None
        if self._responses is not None and request is not None:
            response = self._responses.write_failure(number, request, failure, len(prompt))
        ids = prompt if self._ids else None
        return RowResult(offset, len(prompt), failure=failure, prompt_ids=ids, response=response)

    def _sample(self, output: CompletionOutput, shows_ids: bool) -> RowSample:
        ids = output.token_ids
        entries = output.logprobs if self._logprobs else None
        logprobs = None if entries is None else plain_logprobs(entries)
        return RowSample(output.text, output.finish_reason, len(ids), ids if shows_ids else None, logprobs)


def _failure(error: RowError, of_request: bool) -> RowFailure:
    """Return the error as columns can hold it."""
    return RowFailure(error.kind, without_surrogates(str(error)), error_param(error) if of_request else None)


def _score_columns(scores: list[Score], choice: int | None) -> dict[str, Any]:
    """Return the values of the columns of a task that scores. choice: index of the most likely continuation."""
    first = scores[0]
    values: dict[str, Any] = {
        "logprob": first.logprob,
        "num_tokens": len(first.token_ids),
        "is_greedy": first.is_greedy,
    }
    if choice is not None:
        values |= {"choice": scores[choice].text, "choice_index": choice, "scores": [one.logprob for one in scores]}
    return values
