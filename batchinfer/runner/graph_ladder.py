"""Ladder of step sizes that graphs are captured for: a step is padded to the next rung.

A captured graph has the shapes and the bounds that it was captured with; all other facts of a step it reads from device
memory, so one graph per rung serves every step that fits. There are three kinds of rungs: decodes (one token per
sequence), drafts (a few tokens per sequence, few in all) and mixed steps (anything). Each kind comes twice if contexts
can be long, because the programs of attention are launched for the longest context that a rung allows.

T tokens · S sequences
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

SHORT_CONTEXT = 4096
"""Contexts up to which steps have graphs of their own, in tokens."""

_DRAFT_QUERIES = 8  # tokens of one sequence that attention computes as rows of one decode
_LEAST_MIXED = 64


class StepFacts(NamedTuple):
    """Facts of a step that decide its rung."""

    tokens: int
    sequences: int
    max_length: int  # of the contexts
    max_queries: int  # most tokens of one sequence
    has_prompts: bool

    def bounds(self) -> Rung:
        """Return the rung without padding: how the step is launched if there is no graph for it."""
        if self.has_prompts or self.max_queries > _DRAFT_QUERIES:
            return Rung(self.tokens, self.sequences, self.max_length, 1, True)
        queries = 1 if self.max_queries == 1 else _DRAFT_QUERIES
        return Rung(self.tokens, self.sequences, self.max_length, queries, False)


class Rung(NamedTuple):
    """Size of a captured step: upper bounds of its facts. Fields as in StepFacts and StepInputs."""

    tokens: int
    sequences: int
    max_length: int
    max_queries: int
    has_prompts: bool


class GraphLadder:
    """All rungs of an engine, and the smallest one for a step."""

    def __init__(self, max_num_seqs: int, max_step_tokens: int, max_length: int, max_draft_rows: int) -> None:
        """max_length: the longest context, in tokens. max_draft_rows: tokens up to which steps have drafts."""
        self._lengths = [SHORT_CONTEXT] * (max_length > SHORT_CONTEXT) + [max_length]
        self._max_num_seqs = max_num_seqs
        self._decodes = list(_decode_sizes(max_num_seqs))
        self._drafts = list(_doubled(2, min(max_draft_rows, max_step_tokens)))
        self._mixed = list(_doubled(_LEAST_MIXED, max(max_step_tokens, max_num_seqs)))

    @property
    def rungs(self) -> list[Rung]:
        """Return all rungs, the largest first: the memory of its graph then serves those of the others."""
        found = [rung for max_length in self._lengths for rung in self._rungs_for(max_length)]
        return sorted(found, reverse=True)

    @property
    def largest(self) -> list[Rung]:
        """Return the largest rung of each kind: what graphs need in memory at most."""
        longest = self._rungs_for(self._lengths[-1])
        kinds = {(rung.max_queries, rung.has_prompts): rung for rung in sorted(longest)}
        return sorted(kinds.values(), reverse=True)

    def find(self, step: StepFacts) -> Rung | None:
        """Return the smallest rung that the step fits, None if it fits none."""
        max_length = next((length for length in self._lengths if step.max_length <= length), None)
        if max_length is None or step.sequences > self._max_num_seqs:
            return None
        if not step.has_prompts:
            if step.max_queries == 1 and step.tokens <= self._max_num_seqs:
                return self._decode(_least(self._decodes, step.tokens), max_length)
            if step.max_queries <= _DRAFT_QUERIES and self._drafts and step.tokens <= self._drafts[-1]:
                return self._draft(_least(self._drafts, step.tokens), max_length)
        if step.tokens > self._mixed[-1]:
            return None
        return self._mixture(_least(self._mixed, step.tokens), max_length)

    def _rungs_for(self, max_length: int) -> list[Rung]:
        return [
            *(self._decode(size, max_length) for size in self._decodes),
            *(self._draft(size, max_length) for size in self._drafts),
            *(self._mixture(size, max_length) for size in self._mixed),
        ]

    def _decode(self, tokens: int, max_length: int) -> Rung:
        return Rung(tokens, tokens, max_length, 1, False)

    def _draft(self, tokens: int, max_length: int) -> Rung:
        return Rung(tokens, min(tokens, self._max_num_seqs), max_length, _DRAFT_QUERIES, False)

    def _mixture(self, tokens: int, max_length: int) -> Rung:
        return Rung(tokens, self._max_num_seqs, max_length, 1, True)


def _decode_sizes(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, 8, 16, 24 … 256, 288 … 512, 576 … up to `most`: padding is an eighth of a step at most from 64 on.

    Below 64, a step is bound by reading the weights and padding is free.
    """
    size = 1
    while size < most:
        yield size
        size += size if size < 8 else 8 if size < 256 else 32 if size < 512 else 64
    yield most


def _doubled(least: int, most: int) -> Iterator[int]:
    """Yield `least`, twice as much and so on, and `most`. Nothing if `most` is below 2: no step of that kind exists."""
    while least < most:
        yield least
        least *= 2
    if most >= 2 or least > 2:
        yield most


def _least(sizes: list[int], needed: int) -> int:
    return sizes[bisect_left(sizes, needed)]
