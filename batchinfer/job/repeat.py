"""Work beside the job's loop: something that is called again and again in a thread until it is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from batchinfer.log import log


class Repeat:
    """Calls `work` every `interval_s` seconds. Its failures are warnings: no result depends on it."""

    def __init__(self, interval_s: float, work: Callable[[], None], what: str) -> None:
        self._interval_s = interval_s
        self._work = work
        self._what = what
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=what, daemon=True)

    def __enter__(self) -> Repeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(timeout=1.0)  # it may hang in a store that does not answer

    def _loop(self) -> None:
        while not self._closed.wait(self._interval_s):
            try:
                self._work()
            except Exception as error:
                log.warning(f"{self._what} failed; trying again later", error=str(error))
