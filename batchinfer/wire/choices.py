"""What choices are made of, whatever their form."""

from __future__ import annotations

from dataclasses import dataclass

from batchinfer.request import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. `reason` is set in its last one; `first` in its first.

    `token_ids` are not known where nobody asks for them.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    reason: FinishReason | None
    first: bool
    prompt_logprobs: list[TokenLogprob | None] | None = None
