"""Reading instead of writing: how texts become prompts that the engine reads, and what it read becomes scores.

How a continuation is cut from its context, and a long text into windows, follows lm-evaluation-harness
(`TemplateLM._encode_pair`, `utils.get_rolling_token_windows`), so that scores can be compared with published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.request import Pooling, Score, TokenLogprob

Continuation = str | list[int]
Measure = Literal["sum", "tokens", "characters"]
"""How choices are compared: by their logprob, or by that per token, or per character of their text (as acc_norm)."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """Task: score texts or token ids by their likelihood after the prompt. `by`: how the best one is found."""

    texts: tuple[str | tuple[int, ...], ...]
    by: Measure = "sum"

    def check_texts(self) -> None:
        """Raise InvalidInput if there is nothing to score, or nothing to measure by."""
        if not self.texts or not all(self.texts):
            raise InvalidInput("a continuation is empty" if self.texts else "there is no continuation to score")
        if self.by == "characters" and not all(isinstance(text, str) for text in self.texts):
            raise InvalidInput("continuations of token ids cannot be compared by their characters")


@dataclass(frozen=True, slots=True)
class Rolling:
    """Task: score the whole prompt, its first token after the model's prefix token."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """The prompt's embedding. normalize: to length 1. `dimensions`: how many it must have, where that was asked for."""

    pooling: Pooling
    normalize: bool = False
    dimensions: int | None = None

    def vector(self, hidden: Sequence[float], rows: int) -> list[float]:
        """Return the embedding, of the sum of `rows` hidden states. Raises BadParameters if it has not `dimensions`."""
        if self.dimensions not in (None, len(hidden)):
            problem = f"dimensions is not supported: this model's embeddings have {len(hidden)}"
            raise BadParameters(problem, param="dimensions")
        norm = math.hypot(*hidden) if self.normalize else rows
        return [value / norm for value in hidden] if norm else list(hidden)


Read = Continuations | Rolling | Pooled


def continuations(given: Sequence[Continuation], by: Measure = "sum") -> Continuations:
    return Continuations(tuple(one if isinstance(one, str) else tuple(one) for one in given), by)


def pair(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of the context belong to the continuation: tokens begin with their space."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def windows(ids: list[int], prefix_id: int, context_tokens: int) -> Iterator[tuple[list[int], int]]:
    """(prompt, score_from) of each window of a text: every token is scored once, with as much before it as fits.

    A window feeds at most `context_tokens` tokens to the model, so that its prompt has one more; the last begins early
    enough to be full. The first token of all follows `prefix_id`.
    """
    yield [prefix_id, *ids[:context_tokens]], 1
    for done in range(context_tokens, len(ids), context_tokens):
        end = min(done + context_tokens, len(ids))
        start = end - context_tokens - 1
        yield ids[start:end], done - start


def score_of(readings: Sequence[Sequence[TokenLogprob | None]], text: str | None = None) -> Score:
    """Return one score of all tokens that were read, in one prompt or in the windows of a text."""
    entries = [entry for reading in readings for entry in reading if entry is not None]
    return Score(
        logprob=sum(entry.logprob for entry in entries),
        is_greedy=all(entry.logprob == entry.top[0][1] for entry in entries),
        token_ids=[entry.token_id for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        text=text,
    )


def best_choice(scores: Sequence[Score], by: Measure) -> int:
    """Return the index of the most likely one, the first of equals."""

    def value(index: int) -> float:
        score = scores[index]
        length = {"sum": 1, "tokens": len(score.token_ids), "characters": len(score.text or "")}[by]
        return score.logprob / length

    return max(range(len(scores)), key=value)
