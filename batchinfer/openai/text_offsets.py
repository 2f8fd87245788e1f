"""Where tokens begin in a text: in characters of what a client is given, whatever characters lie across tokens."""

from __future__ import annotations

from collections.abc import Sequence

from batchinfer.text.pieces import Pieces
from batchinfer.text.tokenizer import Tokenizer


class Offsets:
    """Where each token begins in the text that `pieces` make of them, counted from `start`.

    All tokens that share a character begin with it, and a token that has no text where the next text begins. So a
    place is final only once the text goes on beyond it.
    """

    def __init__(self, pieces: Pieces, start: int = 0) -> None:
        self._pieces = pieces
        self._settled = start
        self._pending = ""
        self._final: list[int] = []
        self._open: list[int] = []  # ascending

    def push(self, token_id: int) -> None:
        text = self._pieces.push(token_id)
        pending = self._pieces.pending
        begins = self._settled + _kept(self._pending, text + pending)
        self._open = [min(place, begins) for place in self._open] + [begins]
        self._settled += len(text)
        self._pending = pending
        while self._open and self._open[0] < self._settled:
            self._final.append(self._open.pop(0))

    def take(self, shown: int, last: bool) -> list[int]:
        """The places of the next tokens, those before character `shown`; `last`: of all others too, at most there."""
        if last:
            self._final += self._open
            self._open = []
            count = len(self._final)
        else:
            count = next((number for number, place in enumerate(self._final) if place >= shown), len(self._final))
        taken, self._final = self._final[:count], self._final[count:]
        return [min(place, shown) for place in taken]


def _kept(pending: str, now: str) -> int:
    """How much of the text that was not settled a token left as it was; none where it only went on with it."""
    if len(now) <= len(pending):
        return 0
    both = enumerate(zip(pending, now, strict=False))
    return next((place for place, (one, other) in both if one != other), len(pending))


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its `text`.

    The tokenizer may put tokens around it, and spaces into it where it has none: these have nothing of the text.
    """
    offsets = Offsets(tokenizer.pieces(False))
    for token in ids:
        offsets.push(token)
    decoded = tokenizer.decode_batch([list(ids)], skip_special_tokens=False)[0]
    begins = offsets.take(len(decoded), last=True)
    if decoded == text:
        return begins
    found, place = [], 0
    for token, start, end in zip(ids, begins, [*begins[1:], len(decoded)], strict=True):
        found.append(place)
        own = decoded[start:end]
        if not text.startswith(own, place):
            own = "" if token in tokenizer.special_ids else own.removeprefix(" ")
        place = min(place + len(own), len(text))
    return found
