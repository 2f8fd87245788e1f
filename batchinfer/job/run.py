"""The whole life of one worker: plan, load, run the chunks that are open, finish the output when it is complete."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from pathlib import Path

from batchinfer.errors import AccessDenied, Drained, StorageError
from batchinfer.job.chunk_loop import ChunkLoop, PassRun, Recover
from batchinfer.job.drain import Drain
from batchinfer.job.error_limit import refuse_too_many_errors
from batchinfer.job.finalize import finish_output, is_finished
from batchinfer.job.ledger import CommitKey, Listing
from batchinfer.job.manifest import read_manifest
from batchinfer.job.prepare import PreparedJob, prepare
from batchinfer.job.repeat import Repeat
from batchinfer.job.report import Progress, Report, Silent, report_name
from batchinfer.job.row_feed import Window, open_rows
from batchinfer.job.run_state import Dependencies, Pass, Reporter, RunCounts, Worker
from batchinfer.job.salvage import Salvage
from batchinfer.job.shard import Shard
from batchinfer.job.spool import Spool
from batchinfer.job.summary_writer import SummaryWriter
from batchinfer.log import log
from batchinfer.spec import JobSpec

_QUIET_S = 2.0  # how long the saving waits for the loop to stop, so that nothing finished is missed


def run_job(
    spec: JobSpec,
    *,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    spool_dir: Path | None = None,
    drain: Drain | None = None,
    progress: Progress | None = None,
    dependencies: Dependencies = Dependencies(),  # noqa: B008 - frozen
) -> Report:
    """Run a job, or what is left of it, and return the report that also stands beside the output.

    Raises UserError before any model is loaded, Drained, TooManyRowErrors, InfrastructureError.
    """
    run = JobRun(spec, Worker(shard, spool_dir, drain or Drain(), progress or Silent(), dependencies))
    counts = run.counts
    log.info("shard", index=shard.index, count=shard.count, source=shard.source)
    with run.reporter.reporting():
        job = run.begin()
        store = job.ledger.store
        manifest = read_manifest(store, job.plan, with_parts=False)  # of an earlier run, or of a retry pass
        _run_open_chunks(job, run)
        counts.clock.enter("finishing")
        if manifest is None or not is_finished(store):
            manifest = finish_output(job.ledger, manifest.pass_number if manifest is not None else 0)
        counts.manifest = manifest
        refuse_too_many_errors(job, counts)
    return run.reporter.report(None)


class JobRun:
    """Run of a job by one worker: its settings, its counts, and their reporter."""

    def __init__(self, spec: JobSpec, worker: Worker) -> None:
        self.worker = worker
        self.counts = RunCounts(spec.errors.max)
        self.reporter = Reporter(worker, self.counts)
        self._spec = spec

    def begin(self) -> PreparedJob:
        """Plan, and agree with the plan on storage. From here on the output is ours and gets a report."""
        worker = self.worker
        self.counts.clock.enter("planning")
        open_store, report = worker.dependencies.open_store, report_name(worker.shard)
        job = worker.drain.run_in_thread(lambda: prepare(self._spec, open_store, report))
        self.reporter.job = job
        worker.drain.on_request(lambda: self.reporter.write_report(Drained("stopped before the first row")))
        worker.drain.raise_if_requested()
        plan = job.plan
        log.info(
            "plan", output=job.ledger.store.url, files=len(plan.inputs.files), rows=plan.rows, chunks=len(plan.chunks)
        )
        return job

    def run_pass(self, job: PreparedJob, todo: Pass, listing: Listing, kept: Recover) -> None:
        """Run the chunks of a pass.

        kept: gives the results of a chunk that the pass leaves as they are. listing: the records by which `todo` was
        found.
        """
        counts, worker = self.counts, self.worker
        counts.begin_pass(todo, job.plan)
        if not todo.chunks:
            return
        counts.clock.enter("loading")
        llm = worker.drain.run_in_thread(lambda: worker.dependencies.load_llm(job.spec, job.files))
        counts.engine_stats = llm.stats
        with ExitStack() as stack:
            spool = stack.enter_context(closing(Spool(worker.spool_dir)))
            salvage = Salvage(job.ledger.store, spool, worker.shard, job.plan, todo.number)
            salvage.load_journals(set(todo.chunks))
            window = Window(open_rows(job.plan.chunk_rows, job.spec.engine.max_num_seqs))
            quiet = threading.Event()
            worker.drain.on_request(lambda: self._save(window, quiet, salvage))
            stack.enter_context(Repeat(worker.dependencies.salvage_every_s, salvage.save_journal, "saving the salvage"))
            counts.clock.enter("running")
            try:
                summaries = SummaryWriter(listing, worker.shard, todo.number, todo.chunks, todo.before)
                run = PassRun(job, worker, todo, llm, spool, window)
                ChunkLoop(run, counts, summaries, lambda chunk: kept(chunk) + salvage.results_of(chunk)).run_chunks()
            except Drained:
                quiet.set()
                worker.drain.wait_saved()
                raise
            except (StorageError, AccessDenied):
                raise  # nothing can be saved there now
            except BaseException:
                _save_quietly(salvage)
                raise
            finally:
                worker.drain.on_request(None)

    def _save(self, window: Window, quiet: threading.Event, salvage: Salvage) -> None:
        """Save what is finished, on a request to stop. The loop gets a moment to stop by itself, in case it hangs."""
        window.close()
        quiet.wait(_QUIET_S)
        try:
            salvage.save_journal()
        finally:
            problem = "stopped by a signal with work left: run the same command again to continue"
            self.reporter.write_report(Drained(problem))


def _run_open_chunks(job: PreparedJob, run: JobRun) -> None:
    """Run this worker's chunks that no commit record names. Count the errors of the others if a threshold is set."""
    listing, shard = job.ledger.listing(), run.worker.shard
    done = {key.chunk for key in listing.records}
    own = range(shard.index, len(job.plan.chunks), shard.count)
    todo = Pass(0, [chunk for chunk in own if chunk not in done], [chunk for chunk in own if chunk in done])
    if job.spec.errors.max is not None:
        for record in listing.read(CommitKey(chunk, 0) for chunk in todo.before):
            run.counts.tally.before_rows += record.rows
            run.counts.tally.before_errors += sum(record.errors.values())
    if todo.before:
        log.info("continuing", chunks_done=len(todo.before), chunks_open=len(todo.chunks))
    run.run_pass(job, todo, listing, lambda _: [])


def _save_quietly(salvage: Salvage) -> None:
    try:
        salvage.save_journal()
    except Exception as error:
        log.warning("saving the salvage journal failed; its rows will be computed again", error=str(error))
