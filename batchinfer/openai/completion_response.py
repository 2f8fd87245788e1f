"""Choices of /v1/completions: text, preceded by the prompt with `echo`, and logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchinfer.openai.delta import Delta
from batchinfer.openai.logprobs import CompletionLogprobs, CompletionTokens, PlacedToken, TokenTexts, prompt_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.request_models import CompletionRequest
from batchinfer.request import TokenLogprob

Entries = Sequence[TokenLogprob | None]


class CompletionChoices:
    """Writer of completion choices, whole or in chunks. prompt_ids: token ids of each prompt."""

    object_name = chunk_object_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, texts: TokenTexts, request: ParsedRequest, prompt_ids: list[list[int]]) -> None:
        body = request.body
        assert isinstance(body, CompletionRequest)
        self._texts = texts
        self._num_logprobs = request.params.logprobs
        self._returns_prompt_logprobs = request.returns_prompt_logprobs
        self._prompt_ids = prompt_ids
        pairs = zip(request.contents, prompt_ids, strict=True) if body.echo else ()
        uncut = request.options.truncation is None
        self._echoed = [content if uncut and isinstance(content, str) else texts.decode(ids) for content, ids in pairs]
        self._returns_ids = bool(body.return_token_ids)
        self.first_chunk_fields: dict[str, Any] = {}
        self._n = request.params.n
        self._skips_special = request.params.skip_special_tokens
        self._logprobs = CompletionLogprobs(texts, bool(body.return_tokens_as_token_ids))
        self._tokens: dict[int, CompletionTokens] = {}  # by choice

    def whole_choices(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the choices of a complete answer, one per delta, and further fields of the response (none)."""
        return [self._choice(delta, *self._place_tokens(delta)) for delta in deltas], {}

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the choice of one chunk; none while all new text is held back."""
        prompt, answer = self._place_tokens(delta)
        ids = delta.token_ids if self._num_logprobs is None else answer
        opens = delta.first and (self._echoed or self._returns_ids)  # the prompt comes with the first chunk
        shown = delta.text or answer or opens or (self._returns_ids and ids)
        return [self._choice(delta, prompt, answer)] if shown or delta.finish_reason is not None else []

    def _place_tokens(self, delta: Delta) -> tuple[list[PlacedToken], list[PlacedToken]]:
        """Return the tokens of prompt and answer whose logprobs come with this delta; empty without logprobs."""
        if self._num_logprobs is None:
            return [], []
        prompt = delta.choice // self._n
        echoed = self._echoed[prompt] if self._echoed else ""
        if delta.choice not in self._tokens:
            self._tokens[delta.choice] = CompletionTokens(self._texts, self._skips_special, echoed)
        tokens = self._tokens[delta.choice]
        placed: list[PlacedToken] = []
        if delta.first and self._echoed and delta.prompt_logprobs is not None:
            entries = _limit_alternatives(delta.prompt_logprobs, self._num_logprobs)
            placed = tokens.place_prompt(self._prompt_ids[prompt], entries, echoed)
        return placed, tokens.place_delta(delta)

    def _choice(self, delta: Delta, prompt_tokens: list[PlacedToken], tokens: list[PlacedToken]) -> dict[str, Any]:
        prompt = delta.choice // self._n
        echoes = delta.first and bool(self._echoed)
        has_logprobs = self._num_logprobs is not None
        choice = {
            "index": delta.choice,
            "text": self._echoed[prompt] + delta.text if echoes else delta.text,
            "logprobs": self._logprobs.logprobs_object(prompt_tokens + tokens) if has_logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self._returns_prompt_logprobs and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, delta.prompt_logprobs)
        if self._returns_ids:
            choice["token_ids"] = [token.token_id for token in tokens] if has_logprobs else delta.token_ids
            if delta.first:
                choice["prompt_token_ids"] = self._prompt_ids[prompt]
        return choice


def _limit_alternatives(entries: Entries, count: int) -> Entries:
    """Cut each entry to `count` alternatives; there are more if `prompt_logprobs` is larger than `logprobs`."""
    if all(entry is None or len(entry.top) <= count for entry in entries):
        return entries
    return [None if entry is None else entry._replace(top=entry.top[:count]) for entry in entries]
