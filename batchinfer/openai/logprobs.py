"""Logprobs as the wire has them: tokens as text, keyed and ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from batchinfer.openai.delta import Delta
from batchinfer.openai.text_offsets import Offsets, prompt_offsets
from batchinfer.request import TokenLogprob
from batchinfer.text.tokenizer import Tokenizer

_LEAST = -9999.0  # what OpenAI writes for a probability of zero; JSON has no -Infinity


class TokenTexts:
    """Texts of single tokens, looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; part of a character's, for some."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self.tokenizer.bytes_of(token_id)
        return found

    def text(self, token_id: int) -> str:
        """Bytes that are not UTF-8 on their own become U+FFFD."""
        return self.bytes(token_id).decode(errors="replace")

    def whole(self, token_ids: list[int]) -> str:
        """The text of tokens together, special ones included."""
        return self.tokenizer.decode_batch([token_ids], skip_special_tokens=False)[0]


class Placed(NamedTuple):
    """A token, where it begins in the text that a client is given, and its logprob unless nothing precedes it."""

    offset: int
    token_id: int
    entry: TokenLogprob | None


class CompletionTokens:
    """The tokens of one choice of /v1/completions, in order, as soon as their text is shown.

    Of a text that ends at a stop string it is known only then where it ends.
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool, echoed: str = "") -> None:
        self._texts = texts
        self._offsets = Offsets(texts.tokenizer.pieces(skip_special_tokens), len(echoed))
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._shown = len(echoed)

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], text: str) -> list[Placed]:
        """Those of the prompt, which is shown as `text`."""
        offsets = prompt_offsets(self._texts.tokenizer, token_ids, text)
        return [Placed(*one) for one in zip(offsets, token_ids, entries, strict=True)]

    def more(self, delta: Delta) -> list[Placed]:
        """What can be told once the text of `delta` is shown."""
        for entry in delta.logprobs:
            self._offsets.push(entry.token_id)
            self._waiting.append((entry.token_id, entry))
        self._shown += len(delta.text)
        places = self._offsets.take(self._shown, delta.reason is not None)
        told, self._waiting = self._waiting[: len(places)], self._waiting[len(places) :]
        return [Placed(place, *one) for place, one in zip(places, told, strict=True)]


class CompletionLogprobs:
    """`logprobs` of /v1/completions. as_ids: tokens are written `token_id:7` instead of as text."""

    def __init__(self, texts: TokenTexts, as_ids: bool) -> None:
        self._texts = texts
        self._as_ids = as_ids

    def of(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Lists, an item a token. Beside the best, every dict has the token itself; None where nothing precedes.

        Where two tokens have the same text the larger value stays: clients compare with the largest.
        """
        return {
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
            "tokens": [self._name(token) for token in token_ids],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
        }

    def placed(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        """The same, and where each token begins."""
        lists = self.of([token.token_id for token in tokens], [token.entry for token in tokens])
        return {"text_offset": [token.offset for token in tokens], **lists}

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name, value = self._name(token), finite(logprob)
            top[name] = max(value, top.get(name, value))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.text(token_id)


def chat_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprob], as_ids: bool) -> list[dict[str, Any]]:
    """`logprobs.content` of /v1/chat/completions."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        name = f"token_id:{token_id}" if as_ids else texts.text(token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": list(texts.bytes(token_id))}

    return [
        {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*best) for best in entry.top]} for entry in entries
    ]


def prompt_logprobs(texts: TokenTexts, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token {id: {logprob, rank, decoded_token}}, null for the first.

    The rank is null for a token that is not among the best that were asked for.
    """
    return [None if entry is None else _ranked(texts, entry) for entry in entries]


def _ranked(texts: TokenTexts, entry: TokenLogprob) -> dict[str, Any]:
    ranks = {token: rank for rank, (token, _) in enumerate(entry.top, 1)}
    values = {**dict(entry.top), entry.token_id: entry.logprob}
    return {
        str(token): {"logprob": finite(value), "rank": ranks.get(token), "decoded_token": texts.text(token)}
        for token, value in values.items()
    }


def finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
