"""/v1/completions: prompts as text or token ids, answers as text, logprobs of the prompt with `echo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchinfer.request import SamplingParams, TokenLogprob
from batchinfer.server.errors import bad_request
from batchinfer.server.frontend import Frontend
from batchinfer.server.params import completion_params
from batchinfer.server.replies import Work
from batchinfer.server.samples import Delta
from batchinfer.server.schemas import CompletionRequest
from batchinfer.server.token_texts import CompletionLogprobs, TokenTexts, prompt_logprobs

Entries = Sequence[TokenLogprob | None]


async def prepare(frontend: Frontend, body: CompletionRequest) -> Work:
    """Raises ApiError."""
    params = _params(frontend, body)
    prompts = _prompts(body.prompt)
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    ids = await frontend.in_pool(lambda: _encode(frontend, body, prompts))
    prepared = await frontend.prepare(ids, params)
    echoed: list[str] = []
    if body.echo:
        decoded = frontend.model.parts.tokenizer.decode_batch(ids, skip_special_tokens=False)
        echoed = [known if known is not None else text for known, text in zip(texts, decoded, strict=True)]
    wants_prompt = params.prompt_logprobs is not None
    shape = CompletionShape(frontend.texts, body, ids, echoed, params.n)
    return Work(shape, prepared, live=not wants_prompt, nothing=_nothing(body))


def _params(frontend: Frontend, body: CompletionRequest) -> SamplingParams:
    if _nothing(body):  # the engine is not asked, and takes no request for no tokens
        body = body.model_copy(update={"max_tokens": 1, "min_tokens": None})
    return completion_params(body, frontend.model.parts.defaults)


def _nothing(body: CompletionRequest) -> bool:
    """The prompt back, and no more."""
    return bool(body.echo) and body.max_tokens == 0 and body.logprobs is None and body.prompt_logprobs is None


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt or not all(prompt):
        raise bad_request("prompt is empty", "prompt")
    return list(prompt)


def _encode(frontend: Frontend, body: CompletionRequest, prompts: list[str | list[int]]) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    return frontend.encode(texts, body.add_special_tokens is not False)


class CompletionShape:
    """Choices of /v1/completions. ids: token ids by prompt; echoed: texts to put before the answers, or none."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, texts: TokenTexts, body: CompletionRequest, ids: list[list[int]], echoed: list[str], n: int
    ) -> None:
        self._texts = texts
        self._count = body.logprobs
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._shows_prompt = body.prompt_logprobs is not None
        self._ids = ids
        self._echoed = echoed
        self._n = n
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [self._choice(delta) for delta in deltas], {}

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        quiet = not delta.text and delta.reason is None and not (delta.logprobs or (delta.first and self._echoed))
        return [] if quiet else [self._choice(delta)]

    def _choice(self, delta: Delta) -> dict[str, Any]:
        prompt = delta.choice // self._n
        echoes = delta.first and bool(self._echoed)
        text = self._echoed[prompt] + delta.text if echoes else delta.text
        choice = {
            "index": delta.choice,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.reason,
        }
        if self._count is not None:
            entries: list[TokenLogprob | None] = list(delta.logprobs)
            token_ids = delta.token_ids
            if echoes and delta.prompt_logprobs is not None:
                token_ids = self._ids[prompt] + token_ids
                entries = [*delta.prompt_logprobs, *entries]
            choice["logprobs"] = self._table(delta.choice).of(token_ids, _best(entries, self._count))
        if self._shows_prompt and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, delta.prompt_logprobs)
        return choice

    def _table(self, choice: int) -> CompletionLogprobs:
        if choice not in self._logprobs:
            self._logprobs[choice] = CompletionLogprobs(self._texts, self._as_ids)
        return self._logprobs[choice]


def _best(entries: Entries, count: int) -> Entries:
    """At most `count` alternatives each: a prompt's may be more, if both kinds of logprobs were asked for."""
    if all(entry is None or len(entry.top) <= count for entry in entries):
        return entries
    return [None if entry is None else entry._replace(top=entry.top[:count]) for entry in entries]
