"""Timing of repeated work: a warm-up, then samples and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple, TypeVar

TURNS = 5

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds per call: the fastest, and the median of `samples` calls."""

    min_s: float
    median_s: float
    samples: int


def take_turns(
    works: Mapping[str, Callable[[], T]],
    budget_s: float,
    least: int = 1,
    uncounted: int = 1,
) -> dict[str, list[T]]:
    """Call the works in turns, so that a slow moment of the machine affects all of them, and return their results.

    Each gets five turns: of as many calls as fit into its share of `budget_s`, or of `least`. A turn begins with
    `uncounted` calls, because the other works have evicted its data from the caches. `uncounted` must be at least the
    number of calls with separate data, else some calls are measured with cached data and some without.
    """
    for work in works.values():
        work()
    results: dict[str, list[T]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            for _ in range(uncounted if len(works) > 1 else 0):
                work()
            results[name] += _run_turn(work, budget_s / TURNS / len(works), least)
    return results


def _run_turn(work: Callable[[], T], length_s: float, least: int) -> list[T]:
    results: list[T] = []
    end = perf_counter() + length_s
    while len(results) < least or perf_counter() < end:
        results.append(work())
    return results


def time_in_turn(
    works: Mapping[str, Callable[[], object]],
    budget_s: float = 0.2,
    least: int = 1,
    uncounted: int = 1,
) -> dict[str, Timing]:
    """Return the timing of each work; see `take_turns`."""
    timed = {name: partial(_seconds, work) for name, work in works.items()}
    samples = take_turns(timed, budget_s, least, uncounted)
    return {name: Timing(min(times), percentile(times, 0.5), len(times)) for name, times in samples.items()}


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `values` lie, interpolated linearly.

    `values` is in any order and not empty.
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
