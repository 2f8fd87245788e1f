"""Read-ahead for the engine: a thread that reads prompts and tokenizes them in batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from itertools import islice

from batchinfer.pipeline.prepare import Preparer
from batchinfer.pipeline.prompt import Prepared, Prompt, Refused, contents_of


class Feeder:
    """Bounded read-ahead: prepares at most `depth` batches of `batch` contents before they are asked for.

    An exception of the prompts' own iterator ends the stream and is raised by `next_batch`.
    """

    def __init__(self, prompts: Iterable[Prompt], preparer: Preparer, batch: int = 64, depth: int = 4) -> None:
        self._queue: queue.Queue[list[Prepared | Refused] | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._prompts = prompts
        self._preparer = preparer
        self._batch = batch
        self.done = False
        self._thread = threading.Thread(target=self._feed, name="batchinfer-feeder", daemon=True)
        self._thread.start()

    def next_batch(self, wait_s: float | None) -> list[Prepared | Refused]:
        """Return the next batch; an empty one if none comes within `wait_s` seconds, or at the end (`done`).

        wait_s: None waits until a batch comes.
        """
        if self.done:
            return []
        try:
            batch = self._queue.get(block=wait_s != 0.0, timeout=wait_s)
        except queue.Empty:
            return []
        if isinstance(batch, list):
            return batch
        self.done = True
        if batch is not None:
            raise batch
        return []

    def close(self) -> None:
        """Stop the thread, and drop prompts that were read and not yet returned."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _feed(self) -> None:
        end: BaseException | None = None
        prompts = iter(self._prompts)
        contents = contents_of(prompts)
        try:
            while not self._closed.is_set() and (batch := list(islice(contents, self._batch))):
                self._queue.put(self._preparer.prepare_contents(batch))
        except BaseException as error:
            end = error
        finally:
            close = getattr(prompts, "close", None)
            if close is not None:
                close()
            self._queue.put(end)
