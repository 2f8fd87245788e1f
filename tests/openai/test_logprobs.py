"""Logprobs objects of completions."""

from __future__ import annotations

import math

from batchinfer.openai.logprobs import CompletionLogprobs, PlacedToken, TokenTexts
from batchinfer.request import TokenLogprob


class SameTextTokenizer:
    """Tokens below 5 have the same text: a part of a character."""

    def bytes_of(self, token_id: int) -> bytes:
        return b"\xe6" if token_id < 5 else b"x"


def logprobs_of(entry: TokenLogprob) -> dict:
    return CompletionLogprobs(TokenTexts(SameTextTokenizer()), as_ids=False).logprobs_object([PlacedToken(0, 1, entry)])


def test_tokens_of_equal_text_share_a_key_with_the_larger_logprob():
    entry = TokenLogprob(1, -3.0, ((2, -0.5), (7, -1.0)))
    assert logprobs_of(entry)["top_logprobs"] == [{"\ufffd": -0.5, "x": -1.0}]


def test_minus_infinity_is_written_as_a_number():
    assert logprobs_of(TokenLogprob(1, -math.inf, ()))["token_logprobs"] == [-9999.0]
