"""Logprobs as responses write them: tokens as text, with ranked alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from batchinfer.openai.delta import Delta
from batchinfer.openai.text_offsets import TokenOffsets, prompt_offsets
from batchinfer.request import TokenLogprob
from batchinfer.text.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's value for probability zero; JSON has no -Infinity


class TokenTexts:
    """Cache of the text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be only a part of a character's."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self.tokenizer.bytes_of(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """Return the text of a token; bytes that are not UTF-8 on their own become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of a token sequence, special tokens included."""
        return self.tokenizer.decode_batch([token_ids], skip_special_tokens=False)[0]


class PlacedToken(NamedTuple):
    """A token and its character offset in the client's text; `logprob` is None for the first token of a prompt."""

    offset: int
    token_id: int
    logprob: TokenLogprob | None


class CompletionTokens:
    """Tokens of one choice of /v1/completions, released in order once their text is shown.

    A token is held back while its text is, because a stop string may still cut the text before it.
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool, echoed: str = "") -> None:
        self._texts = texts
        self._offsets = TokenOffsets(texts.tokenizer.pieces(skip_special_tokens), len(echoed))
        self._held: list[tuple[int, TokenLogprob]] = []
        self._shown_chars = len(echoed)

    def place_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], text: str
    ) -> list[PlacedToken]:
        """Return the tokens of a prompt that is shown as `text`."""
        offsets = prompt_offsets(self._texts.tokenizer, token_ids, text)
        return [PlacedToken(*values) for values in zip(offsets, token_ids, logprobs, strict=True)]

    def place_delta(self, delta: Delta) -> list[PlacedToken]:
        """Add the tokens of `delta`; return those whose text is now shown."""
        for entry in delta.logprobs:
            self._offsets.push_token(entry.token_id)
            self._held.append((entry.token_id, entry))
        self._shown_chars += len(delta.text)
        offsets = self._offsets.pop_offsets(self._shown_chars, delta.finish_reason is not None)
        released, self._held = self._held[: len(offsets)], self._held[len(offsets) :]
        return [PlacedToken(offset, *token) for offset, token in zip(offsets, released, strict=True)]


class CompletionLogprobs:
    """Writer of the `logprobs` object of /v1/completions. as_ids: write tokens as `token_id:7` instead of as text."""

    def __init__(self, texts: TokenTexts, as_ids: bool) -> None:
        self._texts = texts
        self._as_ids = as_ids

    def logprobs_object(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """Return lists with an item per token; None for the logprob of a token without a predecessor.

        `top_logprobs` holds the best alternatives and the token itself, keyed by text. If two tokens have the same text
        the larger value stays, because clients compare the token's logprob with the largest.
        """
        entries = [token.logprob for token in tokens]
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [None if entry is None else _clamp(entry.logprob) for entry in entries],
            "tokens": [self._name(token.token_id) for token in tokens],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name, value = self._name(token), _clamp(logprob)
            top[name] = max(value, top.get(name, value))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.token_text(token_id)


def chat_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprob], as_ids: bool) -> list[dict[str, Any]]:
    """Return `logprobs.content` of /v1/chat/completions."""

    def token_object(token_id: int, logprob: float) -> dict[str, Any]:
        name = f"token_id:{token_id}" if as_ids else texts.token_text(token_id)
        return {"token": name, "logprob": _clamp(logprob), "bytes": list(texts.token_bytes(token_id))}

    return [
        {
            **token_object(entry.token_id, entry.logprob),
            "top_logprobs": [token_object(*alternative) for alternative in entry.top],
        }
        for entry in entries
    ]


def prompt_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: per prompt token {id: {logprob, rank, decoded_token}}, null for the first.

    The rank is null for a token that is not among the requested best.
    """
    return [None if entry is None else _ranked(texts, entry) for entry in entries]


def _ranked(texts: TokenTexts, entry: TokenLogprob) -> dict[str, Any]:
    ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
    values = {**dict(entry.top), entry.token_id: entry.logprob}
    return {
        str(token): {"logprob": _clamp(value), "rank": ranks.get(token), "decoded_token": texts.token_text(token)}
        for token, value in values.items()
    }


def _clamp(logprob: float) -> float:
    return logprob if logprob > _MIN_LOGPROB else _MIN_LOGPROB
