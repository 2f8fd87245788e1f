"""The order in which prompts go to the engine: equal prefixes together, and long answers first at the end.

Neighbours in the order of their tokens share the longest prefixes, so a prefix is computed once and is still cached for
the last prompt that has it. While input comes, that is all. Once it has ended, what is left is ordered for a full batch
up to the last step: a step with few sequences reads all weights as well, so the longest answers begin first, and groups
with a long common prefix stay whole. (Longest processing time first: Graham, 1969.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from batchinfer.prompting import Prepared

_GROUP_LEVELS = 8  # groups within groups; deeper ones stay in the order of their tokens


class PrefixOrder:
    """Hands prompts out sorted by their tokens, a window at a time: depth-first over the trie of their prefixes.

    Windows do not mix, so no prompt waits for ever. `finish` makes one last window of what is left.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._next: list[Prepared] = []
        self._now: list[Prepared] = []  # in order, the first last

    def __len__(self) -> int:
        return len(self._now) + len(self._next)

    @property
    def has_room(self) -> bool:
        return len(self._next) < self._window

    def add(self, prepared: Prepared) -> None:
        self._next.append(prepared)

    def pop(self) -> Prepared:
        if not self._now:
            self._now = sorted(self._next, key=_ids, reverse=True)
            self._next = []
        return self._now.pop()

    def finish(self, expected: Callable[[Prepared], int]) -> None:
        """No more will be added: the longest first, by `expected` answer tokens."""
        left = sorted(self._now[::-1] + self._next, key=_ids)
        self._now, self._next = longest_first(left, expected)[::-1], []


def longest_first(
    prompts: list[Prepared], expected: Callable[[Prepared], int], levels: int = _GROUP_LEVELS
) -> list[Prepared]:
    """`prompts`, sorted by tokens, with the longest expected answers first; each group of `_groups` stays together.

    A group is as long as the longest answer in it, and is ordered within in the same way.
    """
    groups = list(_groups(prompts)) if levels else [prompts]
    if len(groups) == 1:
        return prompts
    ordered = [longest_first(group, expected, levels - 1) for group in groups]
    ordered.sort(key=lambda group: max(map(expected, group)), reverse=True)
    return [prompt for group in ordered for prompt in group]


def _groups(prompts: list[Prepared]) -> Iterator[list[Prepared]]:
    """Cut sorted prompts where neighbours share less than half of what is beyond the prefix that all of them share.

    Shorter prefixes cost less to compute again, if they leave the cache at all, than a thin batch.
    """
    begun = _common(prompts[0].ids, prompts[-1].ids) if prompts else 0
    group: list[Prepared] = []
    for prompt in prompts:
        if group:
            shorter = min(len(group[-1].ids), len(prompt.ids)) - begun
            shared = _common(group[-1].ids, prompt.ids) - begun
            if 2 * shared < max(1, shorter) and group[-1].ids != prompt.ids:
                yield group
                group = []
        group.append(prompt)
    if group:
        yield group


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix, by bisection: comparing slices is much faster than a loop over tokens."""
    low, high = 0, min(len(one), len(other)) + 1  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _ids(prepared: Prepared) -> list[int]:
    return prepared.ids
