"""Equality of tokens from steps of different shapes."""

from __future__ import annotations

from collections.abc import Sequence

from batchinfer.request import CompletionOutput, TokenLogprob

_ROUNDING = 0.1  # of a logprob, where activations are rounded to 8 bits; twice what was seen


def same_tokens(
    found: Sequence[CompletionOutput], wanted: Sequence[CompletionOutput], rounded_in_torch: bool = False
) -> bool:
    """Equal. Where plain torch computes with rounded activations, up to a place at which both saw one distribution.

    There a row's last bits depend on how many rows a step has, and rounding makes them so many more that a near tie, or
    a number drawn near a border, gives another token.
    """
    pairs = list(zip(found, wanted, strict=True))
    return all(one.token_ids == other.token_ids or (rounded_in_torch and _split(one, other)) for one, other in pairs)


def _split(one: CompletionOutput, other: CompletionOutput) -> bool:
    """Whether they are equal to a place at which either token could come."""
    tokens = zip(one.token_ids, other.token_ids, strict=False)
    place = next((place for place, (a, b) in enumerate(tokens) if a != b), None)
    if place is None or one.logprobs is None or other.logprobs is None:
        return False
    return abs(_best(one.logprobs[place]) - _best(other.logprobs[place])) < _ROUNDING


def _best(logprob: TokenLogprob) -> float:
    return logprob.top[0][1] if logprob.top else logprob.logprob  # of a greedy token, its own
