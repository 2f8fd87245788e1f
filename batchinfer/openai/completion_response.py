"""Choices of /v1/completions: text, the prompt's before it with `echo`, and a table of logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchinfer.openai.delta import Delta
from batchinfer.openai.logprobs import CompletionLogprobs, CompletionTokens, Placed, TokenTexts, prompt_logprobs
from batchinfer.openai.parse import ParsedRequest
from batchinfer.openai.request_models import CompletionRequest
from batchinfer.request import TokenLogprob

Entries = Sequence[TokenLogprob | None]


class CompletionShape:
    """ids: token ids by prompt."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, texts: TokenTexts, asked: ParsedRequest, ids: list[list[int]]) -> None:
        body = asked.body
        assert isinstance(body, CompletionRequest)
        self._texts = texts
        self._count = asked.params.logprobs
        self._shows_prompt = asked.returns_prompt_logprobs
        self._ids = ids
        pairs = zip(asked.contents, ids, strict=True) if body.echo else ()
        uncut = asked.options.truncation is None
        self._echoed = [content if uncut and isinstance(content, str) else texts.whole(own) for content, own in pairs]
        self._shows_ids = bool(body.return_token_ids)
        self.opening: dict[str, Any] = {}
        self._n = asked.params.n
        self._skips_special = asked.params.skip_special_tokens
        self._table = CompletionLogprobs(texts, bool(body.return_tokens_as_token_ids))
        self._tokens: dict[int, CompletionTokens] = {}  # by choice

    def whole(self, deltas: list[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [self._choice(delta, *self._told(delta)) for delta in deltas], {}

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        before, told = self._told(delta)
        ids = delta.token_ids if self._count is None else told
        opens = delta.first and (self._echoed or self._shows_ids)  # a part of the answer that no other delta has
        shown = delta.text or told or opens or (self._shows_ids and ids)
        return [self._choice(delta, before, told)] if shown or delta.reason is not None else []

    def _told(self, delta: Delta) -> tuple[list[Placed], list[Placed]]:
        """Tokens of prompt and answer whose logprobs this delta tells; none where nobody asked for any."""
        if self._count is None:
            return [], []
        prompt = delta.choice // self._n
        echoed = self._echoed[prompt] if self._echoed else ""
        if delta.choice not in self._tokens:
            self._tokens[delta.choice] = CompletionTokens(self._texts, self._skips_special, echoed)
        tokens = self._tokens[delta.choice]
        before: list[Placed] = []
        if delta.first and self._echoed and delta.prompt_logprobs is not None:
            entries = _best(delta.prompt_logprobs, self._count)
            before = tokens.prompt(self._ids[prompt], entries, echoed)
        return before, tokens.more(delta)

    def _choice(self, delta: Delta, before: list[Placed], told: list[Placed]) -> dict[str, Any]:
        prompt = delta.choice // self._n
        echoes = delta.first and bool(self._echoed)
        choice = {
            "index": delta.choice,
            "text": self._echoed[prompt] + delta.text if echoes else delta.text,
            "logprobs": None if self._count is None else self._table.placed(before + told),
            "finish_reason": delta.reason,
        }
        if self._shows_prompt and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._texts, delta.prompt_logprobs)
        if self._shows_ids:
            choice["token_ids"] = delta.token_ids if self._count is None else [token.token_id for token in told]
            if delta.first:
                choice["prompt_token_ids"] = self._ids[prompt]
        return choice


def _best(entries: Entries, count: int) -> Entries:
    """At most `count` alternatives each: a prompt's may be more, if both kinds of logprobs were asked for."""
    if all(entry is None or len(entry.top) <= count for entry in entries):
        return entries
    return [None if entry is None else entry._replace(top=entry.top[:count]) for entry in entries]
