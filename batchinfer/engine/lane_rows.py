"""Rows of one step's result, by decode lane: lanes come and go between the launch of a step and its result.

State: the row of each lane, and the rows of sequences that have given their lanes up. Owner: `DecodeLanes`, which keeps
one for each step in flight. Flow: with the launch lane i has row i; lanes enter and leave; `pick` puts a result into
the order of lanes. Failure: none. A sequence that has left the engine has no row any more: what is computed for it is a
*surplus row*.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeVar

from batchinfer.engine.sequence import Sequence

_Item = TypeVar("_Item")
_NO_ROW = -1  # of a lane that was entered after the launch


class LaneRows:
    """A row for each of the first lanes. Lanes beyond, and those with `_NO_ROW`, are not in the step.

    apart: (row, sequence) without a lane, because the answer ends with this step or a later one in flight.
    """

    __slots__ = ("_count", "_rows", "apart", "num_rows")

    def __init__(self, count: int) -> None:
        self.apart: list[tuple[int, Sequence]] = []
        self.num_rows = count  # of lanes that are in the step
        self._count = count  # of lanes up to the last one that is in the step
        self._rows: list[int] | None = None  # None: lane i has row i

    def enter_lane(self, row: int) -> None:
        """Give the next lane this row."""
        if row != self._count or self._rows is not None:
            self._as_list().append(row)
        self._count += 1
        self.num_rows += 1

    def leave_lane(self, lane: int, last: int) -> int | None:
        """Move the last lane into `lane`. Return the row that `lane` had, or None."""
        if lane >= self._count:
            return None
        rows = self._as_list()
        row = rows[lane]
        rows[lane] = rows[last] if last < self._count else _NO_ROW
        if last < self._count:
            del rows[last]
            self._count = last
        if row == _NO_ROW:
            return None
        self.num_rows -= 1
        return row

    def pick(self, items: Items[_Item], missing: _Item) -> list[_Item]:
        """Return the items of a result in the order of lanes, `missing` for lanes that are not in the step."""
        if self._rows is None:
            return list(items[: self._count])
        padded = [*items, missing]
        return [padded[row] for row in self._rows]

    def has_row(self, lane: int) -> bool:
        """Return True if the lane is in the step."""
        return lane < self._count and (self._rows is None or self._rows[lane] != _NO_ROW)

    def _as_list(self) -> list[int]:
        if self._rows is None:
            self._rows = list(range(self._count))
        return self._rows
