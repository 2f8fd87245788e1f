"""Times of repeated work: one warm-up, then samples, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

_TURNS = 5


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

    Each gets five turns: of as many calls as fit into its share of `budget_s`, or of one. A turn begins with a call
    that does not count: the others have taken its data out of the caches, and of what is short the next few calls
    still pay for that.
    `before` is called with the name of what is next; its time does not count.
    """
    for name, work in works.items():
        before(name)
        work()
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_TURNS):
        for name, work in works.items():
            before(name)
            if len(works) > 1:
                work()
            samples[name] += _turn(work, budget_s / _TURNS / len(works))
    return {name: Timing(min(times), percentile(times, 0.5), len(times)) for name, times in samples.items()}


def _turn(work: Callable[[], object], length_s: float) -> list[float]:
    """Seconds of each call."""
    times: list[float] = []
    end = perf_counter() + length_s
    while not times or perf_counter() < end:
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, linear between neighbours; `values` in any order, not empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
