"""What choices are made of, whatever their form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from batchinfer.request import FinishReason, TokenLogprob


class Used(NamedTuple):
    """Tokens of a request: of its prompts, of its answers, and of the prompts those that the prefix cache held."""

    prompt: int
    answer: int
    cached: int


def usage(used: Used) -> dict[str, Any]:
    """As completions and chats have it."""
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.answer,
        "total_tokens": used.prompt + used.answer,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. `reason` is set in its last one; `first` in its first. `stop`: the text that ended it.

    `token_ids` are not known where nobody asks for them.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    reason: FinishReason | None
    first: bool
    prompt_logprobs: list[TokenLogprob | None] | None = None
    stop: str | None = None
