"""Times of repeated work: one warm-up, then samples, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

_LEAST = 5  # samples
_MOST = 1000


class Timing(NamedTuple):
    """Seconds of one call: the fastest, and the median of `samples` calls."""

    min_s: float
    median_s: float
    samples: int


def time_in_turn(
    works: Mapping[str, Callable[[], object]],
    budget_s: float = 0.2,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Things that are compared take turns, so that a slow moment of the machine meets all of them.

    Each gets at least five samples, and more until `budget_s` is spent by all together. A turn begins with a call that
    does not count, since the others may have taken its data out of the caches.
    `before` is called with the name of what is next; its time does not count.
    """
    for name, work in works.items():
        before(name)
        work()
    samples: dict[str, list[float]] = {name: [] for name in works}
    start = perf_counter()
    for done in range(_MOST):
        if done >= _LEAST and perf_counter() - start > budget_s:
            break
        for name, work in works.items():
            before(name)
            if len(works) > 1:
                work()
            began = perf_counter()
            work()
            samples[name].append(perf_counter() - began)
    return {name: Timing(min(times), percentile(times, 0.5), len(times)) for name, times in samples.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, linear between neighbours; `values` in any order, not empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
