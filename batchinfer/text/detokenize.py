"""Stop strings and bad words: the parts of text that the token-only engine depends on."""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.request import StopCheck
from batchinfer.text.pieces import Pieces
from batchinfer.text.tokenizer import Tokenizer

_MAX_TRANSITIONS = 1 << 15  # per list of stop strings: 3 MB


class StopStrings:
    """Matcher of stop strings: ends a sequence when one appears in its text, and cuts the text there.

    The stop string that is complete first counts, regardless of token borders; of several that are complete at the same
    character, the longest. `include` keeps it in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], include: bool, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include = include
        self._skip_special_tokens = skip_special_tokens
        self._places = _StopAutomaton(stop, tokenizer.pieces(skip_special_tokens))

    def checker(self, min_tokens: int = 0) -> StopCheck:
        """Return a check for one sequence, in constant time per token.

        A stop string that is complete after `min_tokens` tokens or fewer does not count, as in vLLM.
        """
        return _Checker(self._places.start, min_tokens)

    def cut(self, text: str, after: int = 0) -> str:
        """Cut `text` at the first stop string that ends after character `after`; return all of it if there is none."""
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
    """State of the stop-string automaton: token → next state, computed lazily.

    `tail` is the longest suffix of the text that is a prefix of a stop string, `pieces` the decoder after it. `found`:
    the last token completed a stop string.
    """

    __slots__ = ("found", "pieces", "places", "tail")

    def __init__(self, places: _StopAutomaton, tail: str, pieces: Pieces, found: bool) -> None:
        self.places = places
        self.tail = tail
        self.pieces = pieces
        self.found = found

    def __missing__(self, token_id: int) -> _AutomatonState:
        return self.places.after(self, token_id)


class _StopAutomaton:
    """Finite automaton over tokens for a list of stop strings, shared by sequences and grown on demand.

    Most transitions have been taken before, so a check is a dict lookup. (Aho and Corasick, 1975, over tokens instead
    of characters.)
    """

    def __init__(self, stop: tuple[str, ...], pieces: Pieces) -> None:
        self._stop = stop
        self._beginnings = {text[:length] for text in stop for length in range(1, len(text))}
        self._longest = max(map(len, stop)) - 1
        self.start = _AutomatonState(self, "", pieces, False)
        self._known: dict[Hashable, _AutomatonState] = {}
        self._forget()

    def after(self, place: _AutomatonState, token_id: int) -> _AutomatonState:
        """Compute the transition from `place` by `token_id`."""
        pieces, old = copy(place.pieces), len(place.tail)
        text = place.tail + pieces.push(token_id)
        whole = text + pieces.pending
        # only stop strings completed by this token: the tail may hold an earlier one
        found = any(whole.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self._stop)
        following = _AutomatonState(self, self._tail(text), pieces, found)
        if pieces.state is None:
            return following
        if self._transitions >= _MAX_TRANSITIONS:
            self._forget()
        self._transitions += 1
        following = self._known.setdefault((following.tail, pieces.state, found), following)
        place[token_id] = following
        return following

    def _tail(self, text: str) -> str:
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[-length:]
        return ""

    def _forget(self) -> None:
        """Clear all transitions; running sequences continue from their current states."""
        for place in self._known.values():
            place.clear()
        self._known = {("", self.start.pieces.state, False): self.start}
        self._transitions = 0


class _Checker:
    """Current automaton state of one sequence."""

    __slots__ = ("_early", "_place")

    def __init__(self, start: _AutomatonState, min_tokens: int) -> None:
        self._place = start
        self._early = min_tokens  # remaining tokens that cannot end the sequence

    def __call__(self, token_id: int) -> bool:
        self._place = place = self._place[token_id]
        if self._early > 0:
            self._early -= 1
            return False
        return place.found


def bad_word_ids(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the id sequences that spell each word, at the start of a text and after a space.

    Raises BadParameters for a word that no tokens spell.
    """
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        found = tokenizer.encode_batch([bare, f" {bare}"], add_special_tokens=False)
        if isinstance(found[0], InvalidInput) or not found[0]:
            raise BadParameters(f"bad_words holds {word!r}, which no tokens spell")
        spelled.update((tuple(ids), None) for ids in found if not isinstance(ids, InvalidInput) and ids)
    # a sequence that ends with another one is redundant: the shorter one is refused first
    shortest = sorted(spelled, key=len)
    redundant = {long for long in shortest for short in shortest if long != short and long[-len(short) :] == short}
    return tuple(ids for ids in spelled if ids not in redundant)
