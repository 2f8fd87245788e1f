"""Stop strings and bad words: what of text the token-only engine needs to know."""

from __future__ import annotations

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.request import StopCheck
from batchinfer.text.pieces import Pieces
from batchinfer.text.tokenizer import Tokenizer


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

    def checker(self, min_tokens: int = 0) -> StopCheck:
        """A check for one sequence. Its cost per token does not grow with the sequence.

        A stop string that is complete before output token number `min_tokens` does not count.
        """
        return _Checker(self._stop, self._tokenizer.pieces(self._skip_special_tokens), min_tokens)

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


class _Checker:
    """Keeps the end of the text, one character shorter than the longest stop string."""

    def __init__(self, stop: tuple[str, ...], pieces: Pieces, min_tokens: int) -> None:
        self._stop = stop
        self._pieces = pieces
        self._min_tokens = min_tokens
        self._keep = max(map(len, stop)) - 1
        self._tail = ""
        self._seen = 0

    def __call__(self, output_ids: list[int]) -> bool:
        pieces, found = self._pieces, False
        for token_id in output_ids[self._seen :]:
            old = len(self._tail)
            text = self._tail + pieces.push(token_id)
            self._seen += 1
            if self._seen >= self._min_tokens:
                whole = text + pieces.pending
                # only what this token completes: an earlier one may still stand in the tail
                found = found or any(whole.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self._stop)
            self._tail = text[-self._keep :] if self._keep else ""
        return found


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
