"""The loop of a pass: prompts of open chunks through the engine, results into the spool, complete chunks committed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from batchinfer.job.commit import Committer, PartWriter
from batchinfer.job.ledger import CommitRecord
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.result_encoder import ResultEncoder
from batchinfer.job.results import RowResult, encode_result
from batchinfer.job.row_feed import RowFeed, Window
from batchinfer.job.row_prompts import LineRequest
from batchinfer.job.run_state import Pass, RunCounts, Worker
from batchinfer.job.spool import Spool
from batchinfer.job.summary_writer import SummaryWriter
from batchinfer.llm import Answerer

Recover = Callable[[int], list[RowResult]]


@dataclass(frozen=True, slots=True)
class PassRun:
    """Fixed values of a pass that runs."""

    job: PreparedJob
    worker: Worker
    todo: Pass
    llm: Answerer
    spool: Spool
    window: Window


class ChunkLoop:
    """Runs the chunks of a pass. It follows what happens to them (`ChunkEvents`), each event in the thread it names."""

    def __init__(self, run: PassRun, counts: RunCounts, summaries: SummaryWriter, recover: Recover) -> None:
        """recover: the results of a chunk that are there already. summaries: is told of each commit."""
        self._run = run
        self._counts = counts
        self._summaries = summaries
        self._recover = recover
        self._requests: dict[int, LineRequest] = {}  # of openai-batch rows in the engine, by index
        writer = PartWriter(run.job.ledger, run.job.layout, run.spool, run.todo.number)
        # a commit that failed frees no window: closing it ends the stream of prompts, and with it the loop
        self._committer = Committer(writer, self.chunk_committed, failed=run.window.close)

    def run_chunks(self) -> None:
        """Put every completion into the spool and hand every complete chunk to the committer.

        Raises Drained, TooManyRowErrors, or what stopped a commit.
        """
        run, tally, drain = self._run, self._counts.tally, self._run.worker.drain
        job, plan, llm = run.job, run.job.plan, run.llm
        encoder = ResultEncoder(job.layout, llm.model_facts)
        feed = RowFeed(job, run.spool, run.window, self, self._requests)
        prompts = feed.prompts(run.todo.chunks, llm.model_facts)
        with closing(self._committer), closing(llm.run_prompts(prompts)) as completions, closing(run.window):
            for completion in completions:
                chunk = plan.chunk_of(completion.index)
                tally.add_completion(completion)
                request = self._requests.pop(completion.index, None)
                result = encoder.result(completion.index - plan.bases[chunk], completion.index, completion, request)
                if run.spool.add(chunk, encode_result(result)):
                    self.chunk_complete(chunk)
                if drain.requested or self._committer.failed or tally.too_many:
                    break
            self._committer.finish(lambda: drain.requested)
        if self._counts.committed < len(run.todo.chunks):
            drain.raise_if_requested()
            assert tally.too_many, "the engine ended before all rows were done"
            raise tally.refusal(tally.all_rows, tally.all_errors, "stopped; raise errors.max and run again to go on")

    def finished_results(self, chunk: int) -> list[RowResult]:
        """See `ChunkEvents`; in the feeder's thread."""
        return self._recover(chunk)

    def chunk_opened(self, finished: list[RowResult], left_out: int) -> None:
        """See `ChunkEvents`; in the feeder's thread."""
        self._counts.count_opened(finished, left_out)

    def chunk_complete(self, chunk: int) -> None:
        """Commit a chunk whose rows are all in the spool; in the loop's thread or the feeder's."""
        self._committer.submit(chunk)

    def chunk_committed(self, record: CommitRecord) -> None:
        """Count a commit and make room for more rows; in a committing thread."""
        self._counts.count_committed()
        self._run.window.leave(self._run.job.plan.chunks[record.chunk].count)
        self._summaries.add_record(record)
