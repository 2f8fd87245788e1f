"""Rows that ask for several prompts: each prompt runs by itself, and the row's completion is put together again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from batchinfer.request import Completion


class Gather:
    """Numbers prompts in one thread and puts completions together in another.

    The one prompt of a row has the row's index. Several get negative numbers, so that no row has them. It also
    remembers which rows' answers have token ids.
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}  # number → row, place
        self._rows: dict[int, list[Completion | None]] = {}
        self._next = -1
        self._with_ids: set[int] = set()

    def note_ids(self, row: int) -> None:
        """The row's answer has token ids."""
        self._with_ids.add(row)

    def shows_ids(self, row: int) -> bool:
        """Whether that was said of a row, which is then forgotten."""
        found = row in self._with_ids
        self._with_ids.discard(row)
        return found

    def number(self, row: int, place: int, of: int) -> int:
        """The index of prompt `place` of `of` of a row; the places of a row are numbered in order."""
        if of == 1:
            return row
        if place == 0:
            self._rows[row] = [None] * of
        number, self._next = self._next, self._next - 1
        self._places[number] = (row, place)
        return number

    def rows(self, completions: Generator[Completion, None, None]) -> Generator[Completion, None, None]:
        """One completion per row. Closing it closes `completions`."""
        with closing(completions):
            for completion in completions:
                if completion.index >= 0:
                    yield completion
                    continue
                row, place = self._places.pop(completion.index)
                held = self._rows[row]
                held[place] = completion
                if None not in held:
                    del self._rows[row]
                    yield _together(row, [one for one in held if one is not None])


def _together(row: int, parts: list[Completion]) -> Completion:
    """All answers in the order of their prompts; what is wrong with one of them is wrong with the row."""
    ids = [token for part in parts for token in part.prompt_token_ids]
    error = next((part.error for part in parts if part.error is not None), None)
    if error is not None:
        return Completion(row, ids, error=error)
    outputs = [output for part in parts for output in part.outputs]
    return Completion(row, ids, outputs, parts=parts, cached_tokens=sum(part.cached_tokens for part in parts))
