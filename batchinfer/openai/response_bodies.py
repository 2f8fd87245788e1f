"""Whole answers from what is known when all has ended: for request lines, which nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from batchinfer.errors import RETRYABLE_KINDS
from batchinfer.openai.chat_response import ChatShape
from batchinfer.openai.completion_response import CompletionShape
from batchinfer.openai.content_blocks import Head
from batchinfer.openai.delta import Delta, Used, usage
from batchinfer.openai.embedding_response import embeddings
from batchinfer.openai.logprobs import TokenTexts
from batchinfer.openai.parse import ModelFacts, ParsedRequest
from batchinfer.openai.request_models import CompletionRequest, EmbeddingRequest
from batchinfer.openai.responses_request import ResponseRequest
from batchinfer.openai.responses_response import ResponseAnswer
from batchinfer.pipeline.encoding import Content
from batchinfer.request import FinishReason, TokenLogprob


class SampleResult(NamedTuple):
    """One sample's answer. `ids` where they are shown."""

    text: str
    reason: FinishReason
    tokens: int
    ids: list[int] | None
    logprobs: list[TokenLogprob] | None


class PromptResult(NamedTuple):
    """What is known of one prompt. `ids` where its logprobs or they are shown; `vector` where it was embedded."""

    ids: list[int]
    logprobs: list[TokenLogprob | None] | None
    vector: list[float] | None


class PromptTokenCounts(NamedTuple):
    """Tokens of all prompts of a request; `cached` of them were found in the prefix cache."""

    all: int
    cached: int


class ResponseBodies:
    """Writes the bodies of answers of one model.

    They depend on what was asked and answered alone (`created` is 0), and on how much of it the cache held.
    """

    def __init__(self, model: ModelFacts) -> None:
        self._texts = TokenTexts(model.tokenizer)
        self._model = model

    def build_body(
        self,
        asked: ParsedRequest,
        number: int,
        counted: PromptTokenCounts,
        prompts: Sequence[PromptResult],
        said: Sequence[SampleResult],
    ) -> dict[str, Any]:
        """`said`: the n answers of each prompt, in order. `number` makes the ids. Raises RowError."""
        name = self._model.response_name(asked.body)
        if isinstance(asked.body, EmbeddingRequest):
            vectors = [prompt.vector or [] for prompt in prompts]
            return {**embeddings(asked.body, vectors, counted.all), "model": name}
        deltas = [_delta(asked, prompts, choice, one) for choice, one in enumerate(said)]
        used = Used(counted.all, sum(one.tokens for one in said), counted.cached)
        calls = count()
        if isinstance(asked.body, ResponseRequest):
            head = Head(f"resp_{number:09d}", 0, name)
            answer = ResponseAnswer(self._texts, asked, head, lambda prefix: f"{prefix}_{number:09d}_{next(calls)}")
            return answer.whole(deltas[0], used)
        ids = [prompt.ids or _ids(content) for prompt, content in zip(prompts, asked.contents, strict=True)]
        shape: ChatShape | CompletionShape
        if isinstance(asked.body, CompletionRequest):
            shape = CompletionShape(self._texts, asked, ids)
        else:
            shape = ChatShape(self._texts, asked, ids[0], lambda: f"call_{number:09d}_{next(calls)}")
        choices, more = shape.whole(deltas)
        return {
            "id": f"{shape.prefix}-{number:09d}",
            "object": shape.kind,
            "created": 0,
            "model": name,
            "choices": choices,
            "usage": usage(Used(counted.all, 0, 0) if asked.echo_only else used),
            **more,
        }


def _ids(content: Content) -> list[int]:
    return [token for token in content if isinstance(token, int)]


def _delta(asked: ParsedRequest, prompts: Sequence[PromptResult], choice: int, said: SampleResult) -> Delta:
    if asked.echo_only:
        return Delta(choice, "", [], [], "length", True)
    entries = said.logprobs or []
    scored = prompts[choice // asked.params.n].logprobs
    ids = said.ids if said.ids is not None else [entry.token_id for entry in entries]
    return Delta(choice, said.text, ids, entries, said.reason, True, scored)


def usage_tokens(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of prompts and of answers, from the `usage` of any route's answer."""
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage.get("completion_tokens", 0)


def error_response(kind: str, message: str, param: str | None, prompt_tokens: int) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer to a request that failed."""
    error = {"message": message, "type": kind, "param": param, "code": kind}
    return 500 if kind in RETRYABLE_KINDS else 400, {"error": error, "usage": usage(Used(prompt_tokens, 0, 0))}
