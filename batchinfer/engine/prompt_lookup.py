"""Speculation: tokens that a sequence's own text suggests come next, for a step to verify beside the known one.

Prompt lookup (Saxena 2023, "Prompt lookup decoding"): where the last few tokens stand earlier in prompt or answer, what
followed there is the draft. A step computes the last known token and the draft, and samples at each of them. What is
sampled at a position is what would be sampled there without a draft, if the draft is right up to it; the first token
that differs ends it (Leviathan et al. 2023, of which this is the case of one certain proposal). No token changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

from batchinfer.engine.plan_builder import PlanBuilder
from batchinfer.request import Request

MAX_ROWS = 128  # of a step with drafts: above this a CPU step takes as much longer as it has more rows
_PATTERN = 4  # tokens that must be alike
_PATIENCE = 3  # drafts of which nothing was right, one after another, until a pause
_PAUSE = 16  # tokens; each further pause is twice as long
_TOKEN_BYTES = array("i").itemsize


class Lookup:
    """One sequence's text, and how well drafts from it have done."""

    __slots__ = ("_length", "_most", "_pause", "_rejected", "_resumes_at", "_text")

    def __init__(self, most: int) -> None:
        self._text = bytearray()  # int32: 4 bytes a token, and searched at the speed of memory
        self._most = most
        self._length = most
        self._rejected = 0  # drafts in a row
        self._pause = _PAUSE
        self._resumes_at = 0

    def draft(self, tokens: Items[int], most: int) -> list[int]:
        """What may follow `tokens`, at most `most`; between calls they only grow. Empty: nothing is known."""
        length = min(self._length, most)
        if length <= 0 or len(tokens) < max(self._resumes_at, _PATTERN + 1):
            return []
        text = self._text
        text += array("i", tokens[len(text) // _TOKEN_BYTES :]).tobytes()
        after = self._after_match()
        if after is None:
            return []
        found = list(tokens[after : after + length])
        return (found * length)[:length]  # a match that reaches the end repeats itself

    def judge(self, drafted: int, accepted: int, known: int) -> None:
        """Of the last draft the first `accepted` tokens were right; `known` tokens are known now."""
        longer = min(max(self._length, 2 * drafted), self._most)
        self._length = longer if accepted == drafted else max(1, accepted)
        if accepted:
            self._rejected, self._pause = 0, _PAUSE
            return
        self._rejected += 1
        if self._rejected == _PATIENCE:
            self._rejected = 0
            self._resumes_at = known + self._pause
            self._pause *= 2

    def _after_match(self) -> int | None:
        """The position after the most recent earlier place of the last tokens."""
        text, size = self._text, _PATTERN * _TOKEN_BYTES
        pattern = text[-size:]
        end = len(text) - _TOKEN_BYTES
        while (place := text.rfind(pattern, 0, end)) >= 0:
            if place % _TOKEN_BYTES == 0:
                return place // _TOKEN_BYTES + _PATTERN
            end = place + size - 1
        return None


class Speculation:
    """Drafts for a step's sequences, each of at most `most` tokens. A sequence is known by its seat."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lookups: dict[int, Lookup | None] = {}

    def propose(self, making: PlanBuilder, room: int) -> list[tuple[int, list[int]]]:
        """(place, draft) for those who decode and whose text suggests something; at most `room` tokens in all."""
        found: list[tuple[int, list[int]]] = []
        if self.most == 0 or room <= 0:
            return found
        for place, sequence in enumerate(making.sequences):
            if not sequence.num_output or making.counts[place] > 1 or not making.samples[place]:
                continue
            lookup = self._lookup(sequence.seat, sequence.request)
            if lookup is None:
                continue
            draft = lookup.draft(sequence.tokens, min(room, sequence.limit - len(sequence.tokens) - 1))
            if draft:
                found.append((place, draft))
        longest = self.most
        while longest > 1 and sum(min(len(draft), longest) for _, draft in found) > room:
            longest -= 1
        return [(place, draft[:longest]) for place, draft in found[:room]]

    def judge(self, seat: int, drafted: int, accepted: int, known: int) -> None:
        """See `Lookup.judge`."""
        lookup = self._lookups.get(seat)
        if lookup is not None:
            lookup.judge(drafted, accepted, known)

    def forget(self, seat: int) -> None:
        """Its sequence has left."""
        self._lookups.pop(seat, None)

    def _lookup(self, seat: int, request: Request) -> Lookup | None:
        if seat not in self._lookups:
            self._lookups[seat] = Lookup(self.most) if request.stateless else None
        return self._lookups[seat]
