"""Character offsets of tokens in the text that a client gets, also where a character spans several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from batchinfer.text.pieces import Pieces
from batchinfer.text.tokenizer import Tokenizer


class TokenOffsets:
    """Incremental character offsets of tokens in the text that `pieces` decodes, counted from `start`.

    All tokens of one character have its offset, and a token without text has the offset of the text after it. An offset
    is therefore final only once the text continues beyond it.
    """

    def __init__(self, pieces: Pieces, start: int = 0) -> None:
        self._pieces = pieces
        self._decoded_chars = start
        self._pending = ""
        self._final: list[int] = []
        self._open: list[int] = []  # ascending

    def push_token(self, token_id: int) -> None:
        """Decode one more token."""
        text = self._pieces.push(token_id)
        pending = self._pieces.pending
        begins = self._decoded_chars + _common_prefix(self._pending, text + pending)
        self._open = [min(offset, begins) for offset in self._open] + [begins]
        self._decoded_chars += len(text)
        self._pending = pending
        while self._open and self._open[0] < self._decoded_chars:
            self._final.append(self._open.pop(0))

    def pop_offsets(self, shown_chars: int, last: bool) -> list[int]:
        """Remove and return the offsets before character `shown_chars`; with `last`, all of them, cut to it."""
        if last:
            self._final += self._open
            self._open = []
            count = len(self._final)
        else:
            beyond = (number for number, offset in enumerate(self._final) if offset >= shown_chars)
            count = next(beyond, len(self._final))
        popped, self._final = self._final[:count], self._final[count:]
        return [min(offset, shown_chars) for offset in popped]


def _common_prefix(pending: str, text: str) -> int:
    """Return how many characters of the pending text the next token left as they were; 0 if it added none."""
    if len(text) <= len(pending):
        return 0
    pairs = enumerate(zip(pending, text, strict=False))
    return next((place for place, (before, after) in pairs if before != after), len(pending))


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return the character offset of each prompt token in `text`.

    The tokenizer may add special tokens around the text and spaces within it: these have no characters of `text`.
    """
    offsets = TokenOffsets(tokenizer.pieces(False))
    for token in ids:
        offsets.push_token(token)
    decoded = tokenizer.decode_batch([list(ids)], skip_special_tokens=False)[0]
    begins = offsets.pop_offsets(len(decoded), last=True)
    if decoded == text:
        return begins
    found, place = [], 0
    for token, start, end in zip(ids, begins, [*begins[1:], len(decoded)], strict=True):
        found.append(place)
        piece = decoded[start:end]
        if not text.startswith(piece, place):
            piece = "" if token in tokenizer.special_ids else piece.removeprefix(" ")
        place = min(place + len(piece), len(text))
    return found
