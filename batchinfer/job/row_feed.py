"""Chunks in, prompts out: reads the rows of open chunks in order, with back-pressure from their commits."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from batchinfer.io.rows import Inputs, RowBatch, stream_rows
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.results import RowResult, encode_result
from batchinfer.job.row_prompts import LineRequest, RowContext
from batchinfer.job.spool import Spool
from batchinfer.openai.parse import ModelFacts
from batchinfer.pipeline.prompt import Prompt


class Window:
    """Limit on open rows, read and not yet committed: bounds memory and spool, even behind a straggler."""

    def __init__(self, rows: int) -> None:
        self._limit = rows
        self._open = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, rows: int) -> bool:
        """Wait for room for `rows`; return False if the window was closed. A chunk always fits an empty window."""
        with self._changed:
            while not self._closed and self._open and self._open + rows > self._limit:
                self._changed.wait()
            self._open += rows
            return not self._closed

    def leave(self, rows: int) -> None:
        """Make room: `rows` were committed."""
        with self._changed:
            self._open -= rows
            self._changed.notify_all()

    def close(self) -> None:
        """Admit nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class ChunkEvents(Protocol):
    """Events of chunks that a feed opens, and its one question. Called in the engine's feeder thread."""

    def finished_results(self, chunk: int) -> list[RowResult]:
        """Return the results of the chunk that an earlier run left, so their rows do not run again."""

    def chunk_opened(self, finished: list[RowResult], left_out: int) -> None:
        """Note that a chunk was read: which results it has already, and how many rows `where` leaves out."""

    def chunk_complete(self, chunk: int) -> None:
        """Commit a chunk that needs no prompt at all."""


@dataclass(frozen=True, slots=True)
class RowFeed:
    """Makes prompts of chunks.

    requests: gets the requests of openai-batch rows, by index; the loop removes them as completions come.
    """

    job: PreparedJob
    spool: Spool
    window: Window
    events: ChunkEvents
    requests: dict[int, LineRequest]

    def prompts(self, chunks: list[int], model: ModelFacts) -> Iterator[Prompt]:
        """Yield the prompts of these chunks' rows. Runs in the engine's feeder thread.

        A prompt's index is that of its row in the whole job.
        """
        plan, spec, rows = self.job.plan, self.job.spec, self.job.rows
        inputs = plan.inputs.select(rows.read_columns | set(self.job.layout.needed))
        spans = (plan.chunks[chunk] for chunk in chunks)
        for chunk, (span, batch) in zip(chunks, stream_rows(inputs, spans, spec.storage), strict=True):
            if not self.window.enter(span.count):
                return
            wanted = self._open_chunk(chunk, batch, inputs)
            context = RowContext(inputs.text_json, model, plan.bases[chunk], spec.seed)
            yield from rows.prompts(batch, wanted, context, self.requests)

    def _open_chunk(self, chunk: int, batch: RowBatch, inputs: Inputs) -> list[int]:
        """Spool the columns that the chunk's part will carry; return the offsets of the rows that are left to run."""
        plan, layout = self.job.plan, self.job.layout
        selected = self.job.rows.select(batch, inputs.text_json)
        known = set(selected)
        finished = [result for result in self.events.finished_results(chunk) if result.offset in known]
        carried = batch.table.select(list(layout.needed))
        if layout.file_column is not None:
            name = plan.inputs.files[plan.chunks[chunk].file].name
            carried = carried.append_column(layout.file_column, pa.repeat(name, carried.num_rows))
        self.events.chunk_opened(finished, carried.num_rows - len(selected))
        if len(selected) < carried.num_rows:
            carried = carried.take(pa.array(selected, pa.int64()))
        left = self.spool.open(chunk, len(selected), map(encode_result, finished), carried)
        if left == 0:
            self.events.chunk_complete(chunk)
        done = {result.offset for result in finished}
        return [offset for offset in selected if offset not in done] if done else selected


def open_rows(chunk_rows: Iterable[int], max_num_seqs: int) -> int:
    """Return the window, in rows, that keeps the engine fed while a few chunks are being finished and committed."""
    return max(4 * max(chunk_rows), 16 * max_num_seqs + 4096)
