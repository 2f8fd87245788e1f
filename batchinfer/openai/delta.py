"""Incremental output of one sample, and token usage: the input of every response format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from batchinfer.request import FinishReason, TokenLogprob


class TokenUsage(NamedTuple):
    """Token counts of a request. `cached_tokens` is the part of `prompt_tokens` found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def usage_object(usage: TokenUsage) -> dict[str, Any]:
    """Return the `usage` object of completions and chats."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one choice.

    first: this is the choice's first delta. finish_reason: set in its last one. token_ids: empty if the caller did not
    keep them. stop_string: the stop string that ended the text, if one did.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    first: bool
    prompt_logprobs: list[TokenLogprob | None] | None = None
    stop_string: str | None = None
