"""Whole response bodies, built from the results of a finished request: for openai-batch rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from batchinfer.errors import RETRYABLE_KINDS
from batchinfer.openai.chat_response import ChatChoices
from batchinfer.openai.completion_response import CompletionChoices
from batchinfer.openai.content_blocks import ResponseHead
from batchinfer.openai.delta import Delta, TokenUsage, usage_object
from batchinfer.openai.embedding_response import embedding_response
from batchinfer.openai.logprobs import TokenTexts
from batchinfer.openai.parse import ModelFacts, ParsedRequest
from batchinfer.openai.request_models import CompletionRequest, EmbeddingRequest
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.responses_response import ResponseEvents
from batchinfer.pipeline.encoding import Content
from batchinfer.request import FinishReason, TokenLogprob


class SampleResult(NamedTuple):
    """Output of one sample. `ids` is None unless the response shows token ids."""

    text: str
    finish_reason: FinishReason
    tokens: int
    ids: list[int] | None
    logprobs: list[TokenLogprob] | None


class PromptResult(NamedTuple):
    """Output about one prompt. `ids` is empty unless shown or needed for logprobs; `vector` is its embedding."""

    ids: list[int]
    logprobs: list[TokenLogprob | None] | None
    vector: list[float] | None


class PromptTokenCounts(NamedTuple):
    """Tokens of all prompts of a request; `cached` of them were found in the prefix cache."""

    all: int
    cached: int


class ResponseBodies:
    """Writer of one model's response bodies.

    A body is a function of request and results alone (`created` is 0), except for the number of cached tokens.
    """

    def __init__(self, model: ModelFacts) -> None:
        self._texts = TokenTexts(model.tokenizer)
        self._model = model

    def build_body(
        self,
        request: ParsedRequest,
        number: int,
        counts: PromptTokenCounts,
        prompts: Sequence[PromptResult],
        samples: Sequence[SampleResult],
    ) -> dict[str, Any]:
        """Return the body. samples: n per prompt, in order. number: the ids are made from it."""
        name = self._model.response_name(request.body)
        if isinstance(request.body, EmbeddingRequest):
            vectors = [prompt.vector or [] for prompt in prompts]
            return embedding_response(request.body, vectors, counts.all, name)
        deltas = [_delta(request, prompts, choice, sample) for choice, sample in enumerate(samples)]
        usage = TokenUsage(counts.all, sum(sample.tokens for sample in samples), counts.cached)
        calls = count()
        if isinstance(request.body, ResponseRequest):
            head = ResponseHead(f"resp_{number:09d}", 0, name)
            response = ResponseEvents(self._texts, request, head, lambda kind: f"{kind}_{number:09d}_{next(calls)}")
            return response.whole_response(deltas[0], usage)
        prompt_ids = [
            prompt.ids or _token_ids(content) for prompt, content in zip(prompts, request.contents, strict=True)
        ]
        writer: ChatChoices | CompletionChoices
        if isinstance(request.body, CompletionRequest):
            writer = CompletionChoices(self._texts, request, prompt_ids)
        else:
            writer = ChatChoices(self._texts, request, prompt_ids[0], lambda: f"call_{number:09d}_{next(calls)}")
        choices, fields = writer.whole_choices(deltas)
        return {
            "id": f"{writer.id_prefix}-{number:09d}",
            "object": writer.object_name,
            "created": 0,
            "model": name,
            "choices": choices,
            "usage": usage_object(TokenUsage(counts.all, 0, 0) if request.echo_only else usage),
            **fields,
        }


def _token_ids(content: Content) -> list[int]:
    return [token for token in content if isinstance(token, int)]


def _delta(request: ParsedRequest, prompts: Sequence[PromptResult], choice: int, sample: SampleResult) -> Delta:
    if request.echo_only:
        return Delta(choice, "", [], [], "length", True)
    entries = sample.logprobs or []
    scored = prompts[choice // request.params.n].logprobs
    ids = sample.ids if sample.ids is not None else [entry.token_id for entry in entries]
    return Delta(choice, sample.text, ids, entries, sample.finish_reason, True, scored)


def usage_tokens(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Return (prompt tokens, answer tokens) from the `usage` object of any route's response."""
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage.get("completion_tokens", 0)


def error_response(kind: str, message: str, param: str | None, prompt_tokens: int) -> tuple[int, dict[str, Any]]:
    """Return (HTTP status, body) of the response to a failed request."""
    error = {"message": message, "type": kind, "param": param, "code": kind}
    usage = usage_object(TokenUsage(prompt_tokens, 0, 0))
    return 500 if kind in RETRYABLE_KINDS else 400, {"error": error, "usage": usage}
