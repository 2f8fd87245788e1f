"""Complete chunks into committed parts, in a few threads beside the engine.

A chunk's rows are sorted, its part is written to local disk, uploaded whole under a name that its content decides, and
then made real by its commit record. Whatever fails here stops the job: `finish` raises it in the job's loop.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchinfer.io.rows import write_rows
from batchinfer.job.columns import OutputLayout
from batchinfer.job.ledger import CommitRecord, Ledger, part_name
from batchinfer.job.openai_lines import build_lines
from batchinfer.job.part_table import build_table
from batchinfer.job.results import count_results, decode_results
from batchinfer.job.spool import Spool
from batchinfer.log import log

_THREADS = 2  # one builds while the other uploads
_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Builds, uploads and commits one chunk."""

    ledger: Ledger
    layout: OutputLayout
    spool: Spool
    pass_number: int

    def commit_chunk(self, chunk: int) -> CommitRecord:
        plan = self.ledger.plan
        results = decode_results(self.spool.lines(chunk))
        carried = self.spool.carried(chunk)
        assert len(results) == carried.num_rows, f"chunk {chunk}: {len(results)} results for {carried.num_rows} rows"
        if self.layout.format == "openai-batch":
            table = build_lines(self.layout, results, carried, plan.bases[chunk])
        else:
            table = build_table(self.layout, results, carried, plan.chunks[chunk].start)
        counts = count_results(results, self.layout.exploded)
        part, size, sha256 = None, 0, ""
        last = chunk == len(plan.chunks) - 1
        if counts.output_rows or last:  # readers find parts/ and the columns even where nothing was selected
            local = self.spool.scratch(f"{chunk:06d}.part")
            layout = self.layout
            compression = None if layout.compression == "none" else layout.compression
            own_json = layout.text_json.difference(layout.carried)
            write_rows(local, table, layout.file_format, compression, layout.text_json, own_json)
            sha256, size = _hash(local), local.stat().st_size
            part = part_name(plan, chunk, sha256, self.layout.suffix)
            self.ledger.store.put_file(part, local)
            local.unlink()
        record = CommitRecord(
            chunk=chunk,
            pass_number=self.pass_number,
            fingerprint=plan.digest,
            part=part,
            size_bytes=size,
            sha256=sha256,
            rows=counts.rows,
            output_rows=counts.output_rows,
            ok=counts.ok,
            errors=counts.errors,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            scored_tokens=counts.scored_tokens,
        )
        holds = self.ledger.commit(record)
        if holds != record:
            log.warning("another worker had committed this chunk: its results hold", chunk=chunk)
        self.spool.drop(chunk)
        return holds


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Committer:
    """Commits chunks in the background. The queue is bounded by the window of open chunks, which `done` reopens."""

    def __init__(self, writer: PartWriter, done: Callable[[CommitRecord], None], failed: Callable[[], None]) -> None:
        self._writer = writer
        self._done = done
        self._on_failure = failed
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"commit-{number}", daemon=True) for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def submit(self, chunk: int) -> None:
        self._queue.put(chunk)

    def finish(self, stopping: Callable[[], bool]) -> None:
        """Wait for everything submitted, or until `stopping`. Raises what stopped a commit."""
        for _ in self._threads:
            self._queue.put(None)
        while any(thread.is_alive() for thread in self._threads) and not stopping():
            for thread in self._threads:
                thread.join(timeout=0.05)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Begin no further commit, and give those that are under way a moment."""
        self._closed = True
        for thread in self._threads:
            self._queue.put(None)
            thread.join(timeout=_GRACE_S)

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None and not self.failed and not self._closed:
            try:
                self._done(self._writer.commit_chunk(chunk))
            except BaseException as error:
                self._error = error
                self._on_failure()
