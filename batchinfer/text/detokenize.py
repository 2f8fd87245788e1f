"""Stop strings and bad words: what of text the token-only engine needs to know."""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.request import StopCheck
from batchinfer.text.pieces import Pieces
from batchinfer.text.tokenizer import Tokenizer

_MOST_MOVES = 1 << 15  # that one list of stop strings remembers: 3 MB


class StopStrings:
    """Ends a sequence when one of `stop` appears in its text, and cuts the text there.

    The stop string that is complete first counts, whatever the token borders; of several that are complete at the same
    character, the longest. `include` keeps it in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], include: bool, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include = include
        self._skip_special_tokens = skip_special_tokens
        self._places = _Places(stop, tokenizer.pieces(skip_special_tokens))

    def checker(self, min_tokens: int = 0) -> StopCheck:
        """A check for one sequence. Its cost per token does not grow with the sequence.

        A stop string that is complete after `min_tokens` tokens or fewer does not count, as in vLLM.
        """
        return _Checker(self._places.start, min_tokens)

    def cut(self, text: str, after: int = 0) -> str:
        """`text` up to the first stop string that ends after character `after`, or through it; all if none does."""
        ends = []
        for stop in self._stop:
            start = text.find(stop, max(0, after - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start))
        if not ends:
            return text
        end, start = min(ends)
        return text[: end if self._include else start]


class _AutomatonState(dict[int, "_AutomatonState"]):
    """All of a text that matters for what follows; the next place by the next token, found out when it is asked for.

    `tail` is the longest end of the text that a stop string begins with, `pieces` the decoder after it. `found`: the
    last token completed a stop string.
    """

    __slots__ = ("found", "pieces", "places", "tail")

    def __init__(self, places: _Places, tail: str, pieces: Pieces, found: bool) -> None:
        self.places = places
        self.tail = tail
        self.pieces = pieces
        self.found = found

    def __missing__(self, token_id: int) -> _AutomatonState:
        return self.places.after(self, token_id)


class _Places:
    """The places that the sequences with these stop strings have been at: a finite automaton that grows by use.

    Most tokens lead where an earlier one has led already, so a check is a look-up. (Aho and Corasick, 1975, over
    tokens in the place of characters.)
    """

    def __init__(self, stop: tuple[str, ...], pieces: Pieces) -> None:
        self._stop = stop
        self._beginnings = {text[:length] for text in stop for length in range(1, len(text))}
        self._longest = max(map(len, stop)) - 1
        self.start = _AutomatonState(self, "", pieces, False)
        self._known: dict[Hashable, _AutomatonState] = {}
        self._forget()

    def after(self, place: _AutomatonState, token_id: int) -> _AutomatonState:
        """Where `token_id` leads from `place`."""
        pieces, old = copy(place.pieces), len(place.tail)
        text = place.tail + pieces.push(token_id)
        whole = text + pieces.pending
        # only what this token completes: an earlier one may still stand in the tail
        found = any(whole.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self._stop)
        following = _AutomatonState(self, self._tail(text), pieces, found)
        if pieces.state is None:
            return following
        if self._moves >= _MOST_MOVES:
            self._forget()
        self._moves += 1
        following = self._known.setdefault((following.tail, pieces.state, found), following)
        place[token_id] = following
        return following

    def _tail(self, text: str) -> str:
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[-length:]
        return ""

    def _forget(self) -> None:
        """Sequences go on from the places where they are."""
        for place in self._known.values():
            place.clear()
        self._known = {("", self.start.pieces.state, False): self.start}
        self._moves = 0


class _Checker:
    """Where one sequence is."""

    __slots__ = ("_early", "_place")

    def __init__(self, start: _AutomatonState, min_tokens: int) -> None:
        self._place = start
        self._early = min_tokens  # tokens to come that no stop string may end with

    def __call__(self, token_id: int) -> bool:
        self._place = place = self._place[token_id]
        if self._early > 0:
            self._early -= 1
            return False
        return place.found


def bad_word_ids(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The id sequences that spell each word, at the start of a text and after a space.

    Raises BadParameters for a word that no token spells.
    """
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        found = tokenizer.encode_batch([bare, f" {bare}"], add_special_tokens=False)
        if isinstance(found[0], InvalidInput) or not found[0]:
            raise BadParameters(f"bad_words holds {word!r}, which no tokens spell")
        spelled.update((tuple(ids), None) for ids in found if not isinstance(ids, InvalidInput) and ids)
    # a sequence that ends in another one can never be reached: the other is refused already
    shortest = sorted(spelled, key=len)
    redundant = {long for long in shortest for short in shortest if long != short and long[-len(short) :] == short}
    return tuple(ids for ids in spelled if ids not in redundant)
