"""Speculative decoding by prompt lookup: drafts from a sequence's own text, verified in the same step.

Prompt lookup (Saxena 2023, "Prompt lookup decoding"): if the last few tokens occur earlier in prompt or answer, the
tokens that followed there are the draft. A step computes the last known token and the draft, and samples at each of
them. A sampled token is the token without a draft as long as the draft is right up to it; the first token that differs
ends the draft (Leviathan et al. 2023, for a proposal with probability 1). Drafts change no token.

State: per seat the text of its sequence and how well its drafts did. Owner: the scheduler. Flow: `propose_drafts` while
a step is planned, `judge_draft` when its result has come, `forget_seat` when a sequence leaves. Failure: a wrong draft
costs its rows of one step; sequences with wrong drafts pause.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

from batchinfer.engine.decode_lanes import DecodeLanes
from batchinfer.engine.sequence import Sequence
from batchinfer.request import Request

_PATTERN = 4  # tokens that must match
_PATIENCE = 3  # rejected drafts in a row until a pause
_PAUSE = 16  # tokens; each further pause is twice as long
_TOKEN_BYTES = array("i").itemsize


class Lookup:
    """The text of one sequence, and how well drafts from it have done. `most`: tokens of a draft."""

    __slots__ = ("_length", "_most", "_pause", "_rejected", "_resumes_at", "_text")

    def __init__(self, most: int) -> None:
        self._text = bytearray()  # int32: 4 bytes a token, searched at memory speed
        self._most = most
        self._length = most
        self._rejected = 0  # drafts in a row
        self._pause = _PAUSE
        self._resumes_at = 0

    def draft_tokens(self, tokens: Items[int], most: int) -> list[int]:
        """Return a draft of at most `most` tokens after `tokens`, or [] without a match. `tokens` only ever grow."""
        length = min(self._length, most)
        if length <= 0 or len(tokens) < max(self._resumes_at, _PATTERN + 1):
            return []
        self._extend_text(tokens)
        after = self._find_match(_PATTERN)
        if after is None:
            return []
        found = list(tokens[after : after + length])
        return (found * length)[:length]  # a match that reaches the end repeats itself

    def may_draft(self, tokens: Items[int], unknown: int) -> bool:
        """Return True if there may be a draft after `tokens` and `unknown` tokens more.

        A match of the last tokens begins with one of the known ones among them.
        """
        known = _PATTERN - unknown
        if len(tokens) + unknown < max(self._resumes_at, _PATTERN + 1):
            return False
        self._extend_text(tokens)
        return known <= 0 or self._find_match(known) is not None

    def judge_draft(self, drafted: int, accepted: int, known: int) -> None:
        """Adapt to the last draft, of which the first `accepted` tokens were right; `known` tokens are known now."""
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

    def _extend_text(self, tokens: Items[int]) -> None:
        self._text += array("i", tokens[len(self._text) // _TOKEN_BYTES :]).tobytes()

    def _find_match(self, count: int) -> int | None:
        """Return the position after the most recent earlier occurrence of the last `count` tokens."""
        text, size = self._text, count * _TOKEN_BYTES
        pattern = text[-size:]
        end = len(text) - _TOKEN_BYTES
        while (place := text.rfind(pattern, 0, end)) >= 0:
            if place % _TOKEN_BYTES == 0:
                return place // _TOKEN_BYTES + count
            end = place + size - 1
        return None


class Speculation:
    """Drafts for the sequences of a step, each of at most `most` tokens. Lookups are kept by seat."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lookups: dict[int, Lookup | None] = {}

    def propose_drafts(self, lanes: DecodeLanes, room: int) -> list[tuple[Sequence, list[int]]]:
        """Return drafts for the decoding sequences whose text suggests one, at most `room` tokens in all."""
        found: list[tuple[Sequence, list[int]]] = []
        if self._most == 0 or room <= 0:
            return found
        for sequence in lanes.settle_all():
            lookup = self._lookup_of(sequence.seat, sequence.request)
            if lookup is not None:
                draft = lookup.draft_tokens(sequence.tokens, min(room, sequence.limit - len(sequence.tokens) - 1))
                if draft:
                    found.append((sequence, draft))
        longest = self._most
        while longest > 1 and sum(min(len(draft), longest) for _, draft in found) > room:
            longest -= 1
        return [(sequence, draft[:longest]) for sequence, draft in found[:room]]

    def may_draft(self, lanes: DecodeLanes) -> bool:
        """Return True if a decoding sequence may want a draft once its tokens in flight are known.

        The known tokens decide: without an earlier occurrence of the last ones, no token makes a match.
        """
        if self._most == 0:
            return False
        for lane, sequence in enumerate(lanes.settle_all()):
            lookup = self._lookup_of(sequence.seat, sequence.request)
            unknown = lanes.positions[lane] + 1 - len(sequence.tokens)
            room = sequence.limit - lanes.positions[lane] - 2
            if lookup is not None and room > 0 and lookup.may_draft(sequence.tokens, unknown):
                return True
        return False

    def judge_draft(self, seat: int, drafted: int, accepted: int, known: int) -> None:
        """Call `Lookup.judge_draft` for the sequence of a seat."""
        lookup = self._lookups.get(seat)
        if lookup is not None:
            lookup.judge_draft(drafted, accepted, known)

    def forget_seat(self, seat: int) -> None:
        """Drop the text of a sequence that leaves its seat."""
        self._lookups.pop(seat, None)

    def _lookup_of(self, seat: int, request: Request) -> Lookup | None:
        """Return the lookup of a seat, or None if its tokens depend on the tokens before and cannot be drafted."""
        if seat not in self._lookups:
            self._lookups[seat] = Lookup(self._most) if request.stateless else None
        return self._lookups[seat]
