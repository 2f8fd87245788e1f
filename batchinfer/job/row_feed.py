"""Chunks in, prompts out: reads the rows of open chunks in order, a bounded number of rows ahead of their commits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.io.rows import Inputs, RowBatch, stream_rows
from batchinfer.job.columns import OutputLayout
from batchinfer.job.plan import JobPlan
from batchinfer.job.results import RowResult, encode_result
from batchinfer.job.row_prompts import LineRequest, RowContext, RowPrompts
from batchinfer.job.spool import Spool
from batchinfer.openai.parse import ModelFacts
from batchinfer.pipeline.prompt import Prompt
from batchinfer.spec import StorageSpec


class Window:
    """How many rows may be open, read and not yet committed: bounds memory and spool, even behind a straggler."""

    def __init__(self, rows: int) -> None:
        self._limit = rows
        self._open = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, rows: int) -> bool:
        """Wait for room (a chunk always fits an empty window); False if the window was closed."""
        with self._changed:
            while not self._closed and self._open and self._open + rows > self._limit:
                self._changed.wait()
            self._open += rows
            return not self._closed

    def leave(self, rows: int) -> None:
        with self._changed:
            self._open -= rows
            self._changed.notify_all()

    def close(self) -> None:
        """Admit nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Feed:
    """Makes prompts of chunks.

    `recover` gives the rows of a chunk that are finished already; `opened` is told of them, and how many rows `where`
    leaves out; `complete` is called for a chunk that needs no prompt at all. `requests`: of openai-batch rows in the
    engine, by index; the loop removes them as completions come.
    """

    plan: JobPlan
    rows: RowPrompts
    layout: OutputLayout
    spool: Spool
    window: Window
    recover: Callable[[int], list[RowResult]]
    complete: Callable[[int], None]
    opened: Callable[[list[RowResult], int], None]
    requests: dict[int, LineRequest]

    def prompts(self, chunks: list[int], seed: int, model: ModelFacts, storage: StorageSpec) -> Iterator[Prompt]:
        """Yield the prompts of these chunks' rows. Runs in the engine's feeder thread.

        A prompt's index is that of its row in the whole job.
        """
        inputs = self.plan.inputs.select(self.rows.read_columns | set(self.layout.needed))
        spans = (self.plan.chunks[chunk] for chunk in chunks)
        for chunk, (span, batch) in zip(chunks, stream_rows(inputs, spans, storage), strict=True):
            if not self.window.enter(span.count):
                return
            wanted = self._open(chunk, batch, inputs)
            context = RowContext(inputs.text_json, model, self.plan.bases[chunk], seed)
            yield from self.rows.prompts(batch, wanted, context, self.requests)

    def _open(self, chunk: int, batch: RowBatch, inputs: Inputs) -> list[int]:
        """Spool what the chunk's part will carry; returns the offsets of the rows that are left to run."""
        selected = self.rows.select(batch, inputs.text_json)
        known = set(selected)
        finished = [row for row in self.recover(chunk) if row.offset in known]
        carried = batch.table.select(list(self.layout.needed))
        if self.layout.file_column is not None:
            name = self.plan.inputs.files[self.plan.chunks[chunk].file].name
            carried = carried.append_column(self.layout.file_column, pa.repeat(name, carried.num_rows))
        self.opened(finished, carried.num_rows - len(selected))
        if len(selected) < carried.num_rows:
            carried = carried.take(pa.array(selected, pa.int64()))
        left = self.spool.open(chunk, len(selected), map(encode_result, finished), carried)
        if left == 0:
            self.complete(chunk)
        done = {row.offset for row in finished}
        return [offset for offset in selected if offset not in done] if done else selected


def open_rows(chunk_rows: Iterable[int], max_num_seqs: int) -> int:
    """A window that keeps the engine fed while a few chunks are being finished and committed, in rows."""
    return max(4 * max(chunk_rows), 16 * max_num_seqs + 4096)
