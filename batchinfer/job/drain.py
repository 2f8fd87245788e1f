"""Stopping in time: SIGTERM, SIGINT and SIGUSR1 ask the job to save what it has and leave with exit code 33.

The C handler of the interpreter writes the signal's number into a pipe at once, whatever the main thread is doing; a
thread reads it. So a step that takes minutes, or a store that hangs, delays nothing: after `deadline_s` the process
ends. Nothing heavy is imported here: the command line installs this before anything else.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from batchinfer.errors import EXIT_DRAINED, Drained
from batchinfer.log import log

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DEADLINE_S = 6.5  # the shortest grace of the platforms is 10 s; 8 s are promised

T = TypeVar("T")


class Drain:
    """A request to stop. `requested` is polled by the job's loop; `saving` callbacks run in a thread of their own.

    `leave` ends the process when the deadline is over. None: the process goes on without this job, and nothing hurries.
    """

    def __init__(self, deadline_s: float = DEADLINE_S, leave: Callable[[int], None] | None = os._exit) -> None:
        self.deadline_s = deadline_s
        self._leave = leave
        self._event = threading.Event()
        self._saved = threading.Event()
        self._lock = threading.Lock()
        self._save: Callable[[], None] | None = None
        self._requested_at = 0.0

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def install(self) -> None:
        """Take over the signals. Main thread only, once per process."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, _nothing)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader, writer), name="drain", daemon=True).start()

    def request(self, reason: str) -> None:
        """Ask to stop: the first call starts the saving and the clock, a second one ends the process at once."""
        if self._event.is_set():
            self._end("second signal: leaving at once", signal=reason)
            return
        log.warning("stopping: saving finished rows", signal=reason, deadline_s=self.deadline_s)
        self._requested_at = time.monotonic()
        for target in (self._watch, self._run_save):
            threading.Thread(target=target, name="drain", daemon=True).start()
        self._event.set()

    def _end(self, why: str, **values: str) -> None:
        if self._leave is not None:
            log.warning(why, **values)
            self._leave(EXIT_DRAINED)

    def raise_if_requested(self) -> None:
        """Raise Drained once stopping was requested."""
        if self._event.is_set():
            raise Drained("stopped by a signal with work left: run the same command again to continue")

    def on_request(self, save: Callable[[], None] | None) -> None:
        """Set what to run when stopping is requested; None runs nothing any more."""
        with self._lock:
            self._save = save

    def wait_saved(self) -> None:
        """Wait until the saving is over, at most until the deadline."""
        self._saved.wait(max(0.0, self._requested_at + self.deadline_s - time.monotonic()))

    def run_in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, so that a request to stop need not wait for it. Raises Drained, or what it raises."""
        self.raise_if_requested()
        results: list[T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)
            done.set()

        threading.Thread(target=run, name="load", daemon=True).start()
        while not done.wait(0.1):
            self.raise_if_requested()
        if errors:
            raise errors[0]
        return results[0]

    def _listen(self, reader: socket.socket, writer: socket.socket) -> None:
        while data := reader.recv(64):
            for number in data:
                if number in SIGNALS:
                    self.request(signal.Signals(number).name)

    def _run_save(self) -> None:
        try:
            with self._lock:
                if self._save is not None:
                    self._save()
        except Exception as error:
            log.warning("could not save all finished rows; they will be computed again", error=str(error))
        self._saved.set()

    def _watch(self) -> None:
        time.sleep(self.deadline_s)
        self._end("leaving: the deadline is over")


def _nothing(number: int, frame: object) -> None:
    """Python needs a handler, or the signal would end the process; the pipe does the work."""
