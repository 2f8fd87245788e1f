"""Times of repeated work: one warm-up, then samples, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple, TypeVar

TURNS = 5

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds of one call: the fastest, and the median of `samples` calls."""

    min_s: float
    median_s: float
    samples: int


def take_turns(
    works: Mapping[str, Callable[[], T]],
    budget_s: float,
    least: int = 1,
    uncounted: int = 1,
) -> dict[str, list[T]]:
    """Things that are compared take turns, so that a slow moment of the machine meets all of them: what calls gave.

    Each gets five turns: of as many calls as fit into its share of `budget_s`, or of `least`. A turn begins with
    `uncounted` calls: the others have taken its data out of the caches. Let that be as many as have data of their own,
    or some are measured with it near and some with it far.
    """
    for work in works.values():
        work()
    given: dict[str, list[T]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            for _ in range(uncounted if len(works) > 1 else 0):
                work()
            given[name] += _turn(work, budget_s / TURNS / len(works), least)
    return given


def _turn(work: Callable[[], T], length_s: float, least: int) -> list[T]:
    given: list[T] = []
    end = perf_counter() + length_s
    while len(given) < least or perf_counter() < end:
        given.append(work())
    return given


def time_in_turn(
    works: Mapping[str, Callable[[], object]],
    budget_s: float = 0.2,
    least: int = 1,
    uncounted: int = 1,
) -> dict[str, Timing]:
    """How long each takes; see `take_turns`."""
    timed = {name: partial(_seconds, work) for name, work in works.items()}
    samples = take_turns(timed, budget_s, least, uncounted)
    return {name: Timing(min(times), percentile(times, 0.5), len(times)) for name, times in samples.items()}


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, linear between neighbours; `values` in any order, not empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
