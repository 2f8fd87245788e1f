"""Calls made side by side while their results are taken one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(
    call: Callable[[A], B], items: Iterable[A], at_once: int, cost: Callable[[A], int] = lambda _: 1
) -> Iterator[B]:
    """Yield the result of each call in the order of `items`, which is read lazily.

    Results that exist or are on their way cost `at_once` in all at most; one that costs more is alone.
    What a call raises is raised where its result would be.
    """
    with _CallWindow(call, at_once) as window:
        for item in items:
            while window.full(cost(item)):
                yield window.pop_result()
            window.submit(item, cost(item))
        while window.waiting:
            yield window.pop_result()


def many_ahead(call: Callable[[list[A]], list[B]], items: Iterable[A], at_once: int, batch: int) -> Iterator[B]:
    """Prefetch as `ahead` does, for a call that takes a `batch` of items."""
    left = iter(items)
    return chain.from_iterable(ahead(call, iter(lambda: list(islice(left, batch)), []), max(1, at_once // batch)))


class _CallWindow(Generic[A, B]):
    """The calls that are under way or done, and not taken."""

    def __init__(self, call: Callable[[A], B], at_once: int) -> None:
        self.waiting: deque[tuple[Future[B], int]] = deque()
        self._call = call
        self._free = at_once
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="ahead")

    def full(self, cost: int) -> bool:
        return bool(self.waiting) and cost > self._free

    def submit(self, item: A, cost: int) -> None:
        self.waiting.append((self._pool.submit(self._call, item), cost))
        self._free -= cost

    def pop_result(self) -> B:
        future, cost = self.waiting.popleft()
        self._free += cost
        return future.result()

    def __enter__(self) -> _CallWindow[A, B]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
