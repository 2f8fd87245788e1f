"""Calls made side by side while their results are taken one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(call: Callable[[A], B], items: Iterable[A], at_once: int) -> Iterator[B]:
    """The result of each call, in the order of `items`; at most `at_once` results exist or are on their way.

    What a call raises is raised where its result would be. Items are taken as they are needed.
    """
    left = iter(items)
    with ThreadPoolExecutor(at_once, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[B]] = deque(pool.submit(call, item) for item in islice(left, at_once))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(call, item) for item in islice(left, 1))
        finally:
            for future in waiting:
                future.cancel()
