"""The order in which prompts go to the engine: equal prefixes together, and long answers first at the end.

Neighbours in the order of their tokens share the longest prefixes, so a prefix is computed once and is still cached for
the last prompt that has it, however small the cache: what the least recently used blocks hold, no waiting prompt needs.
While input comes, that is all. Once it has ended, what is left is ordered for a full batch
up to the last step: a step with few sequences reads all weights as well, so the longest answers begin first, and groups
with a long common prefix stay whole. (Longest processing time first: Graham, 1969.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from batchinfer.pipeline.prompt import Prepared

_GROUP_LEVELS = 8  # groups within groups; deeper ones stay in the order of their tokens


class PrefixOrder:
    """Hands prompts out by their tokens, in sweeps: depth-first over the trie of the prefixes that are there.

    A prompt that comes while its prefix is still ahead of the sweep joins it, the others wait for the next one. At most
    `window` prompts join a sweep, so that no prompt waits for ever; `finish` makes a last sweep of what is left.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._now: list[tuple[list[int], int, Prepared]] = []  # a heap, until `finish` puts its own order
        self._next: list[tuple[list[int], int, Prepared]] = []
        self._at: list[int] = []  # tokens of the last prompt that was handed out
        self._joined = 0  # this sweep
        self._added = 0

    def __len__(self) -> int:
        return len(self._now) + len(self._next)

    @property
    def has_room(self) -> bool:
        return len(self) < 2 * self._window

    def add(self, prepared: Prepared) -> None:
        self._added += 1
        entry = (prepared.ids, self._added, prepared)
        if self._now and prepared.ids >= self._at and self._joined < self._window:
            self._joined += 1
            heappush(self._now, entry)
        else:
            self._next.append(entry)

    def pop(self) -> Prepared:
        if not self._now:
            self._now, self._next, self._joined = self._next, [], 0
            heapify(self._now)
        prepared = heappop(self._now)[2]
        self._at = prepared.ids
        return prepared

    def finish(self, expected: Callable[[Prepared], int]) -> None:
        """No more will be added: the longest first, by `expected` answer tokens."""
        left = [entry[2] for entry in sorted(self._now + self._next)]
        ordered = longest_first(left, expected)
        # a sorted list is a heap: places in the new order take the place of tokens
        self._now, self._next = [([], place, prepared) for place, prepared in enumerate(ordered)], []


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
