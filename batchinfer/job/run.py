"""The outer loop of a job: chunks in, prompts through the engine, rows into the spool, parts and commits out.

`run_job` is the whole life of one worker: plan, load, run what is open, finish what is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path

from batchinfer.errors import AccessDenied, Drained, StorageError
from batchinfer.job.commit import Committer, PartWriter
from batchinfer.job.drain import Drain
from batchinfer.job.error_limit import judge
from batchinfer.job.finalize import finalise, is_finished, read_totals
from batchinfer.job.ledger import CommitKey, CommitRecord, Listing
from batchinfer.job.prepare import PreparedJob, prepare
from batchinfer.job.repeat import Repeat
from batchinfer.job.report import Progress, Report, Silent, report_name
from batchinfer.job.result_encoder import ResultEncoder
from batchinfer.job.results import RowResult, encode_result
from batchinfer.job.row_feed import Feed, Window, open_rows
from batchinfer.job.run_state import Dependencies, Pass, RunState, Worker
from batchinfer.job.salvage import Salvage
from batchinfer.job.shard import Shard
from batchinfer.job.spool import Spool
from batchinfer.job.summary_writer import Folder
from batchinfer.llm import Answerer
from batchinfer.log import log
from batchinfer.request import Completion
from batchinfer.spec import JobSpec

_QUIET_S = 2.0  # how long the saving waits for the loop to stop, so that nothing finished is missed

Recover = Callable[[int], list[RowResult]]


def run_job(
    spec: JobSpec,
    *,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    spool_dir: Path | None = None,
    drain: Drain | None = None,
    progress: Progress | None = None,
    seams: Dependencies = Dependencies(),  # noqa: B008 - frozen
) -> Report:
    """Run a job, or what is left of it, and return the report that also stands beside the output.

    Raises UserError before any model is loaded, Drained, TooManyRowErrors, InfrastructureError.
    """
    worker = Worker(shard, spool_dir, drain or Drain(), progress or Silent(), seams)
    state = RunState(spec, worker)
    log.info("shard", index=shard.index, count=shard.count, source=shard.source)
    with state.reporting():
        work = begin(spec, state)
        manifest = read_totals(work.ledger.store, work.plan)  # of an earlier run, or of a retry pass
        _run_open(work, state)
        state.clock.enter("finishing")
        if manifest is None or not is_finished(work.ledger.store):
            manifest = finalise(work.ledger, manifest["pass"] if manifest is not None else 0)
        state.manifest = manifest
        judge(work, state)
    return state.report(None)


def begin(spec: JobSpec, state: RunState) -> PreparedJob:
    """Plan, and agree with the plan on storage. From here on the output is ours and gets a report."""
    state.clock.enter("planning")
    worker = state.worker
    work = worker.drain.call(lambda: prepare(spec, worker.seams.open_store, report_name(worker.shard)))
    state.work = work
    worker.drain.on_request(lambda: state.write_report(Drained("stopped before the first row")))
    worker.drain.check()
    plan = work.plan
    log.info(
        "plan", output=work.ledger.store.url, files=len(plan.inputs.files), rows=plan.rows, chunks=len(plan.chunks)
    )
    return work


def run_pass(work: PreparedJob, state: RunState, todo: Pass, listing: Listing, kept: Recover) -> None:
    """Run the chunks of a pass; `kept` gives the rows of a chunk that the pass leaves as they are.

    `listing`: the records by which `todo` was found.
    """
    state.begin_pass(todo)
    if not todo.chunks:
        return
    worker = state.worker
    state.clock.enter("loading")
    state.llm = worker.drain.call(lambda: worker.seams.load_llm(work.spec, work.files))
    with ExitStack() as stack:
        spool = stack.enter_context(closing(Spool(worker.spool_dir)))
        salvage = Salvage(work.ledger.store, spool, worker.shard, work.plan, todo.number)
        salvage.load(set(todo.chunks))
        window = Window(open_rows(work.plan.chunk_rows, work.spec.engine.max_num_seqs))
        quiet = threading.Event()
        worker.drain.on_request(lambda: _save(window, quiet, salvage, state))
        stack.enter_context(Repeat(worker.seams.salvage_every_s, salvage.save, "saving the salvage"))
        state.clock.enter("running")
        try:
            folder = Folder(listing, worker.shard, todo.number, todo.chunks, todo.before)
            run_chunks(work, state, spool, window, folder, lambda chunk: kept(chunk) + salvage.rows(chunk))
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


def run_chunks(
    work: PreparedJob, state: RunState, spool: Spool, window: Window, folder: Folder, recover: Recover
) -> None:
    """The outer loop: every completion into the spool, every complete chunk to the committer."""
    plan, tally, drain, llm = work.plan, state.tally, state.worker.drain, state.llm
    assert llm is not None

    def done(record: CommitRecord) -> None:
        state.done()
        window.leave(plan.chunks[record.chunk].count)
        folder.add(record)

    writer = PartWriter(work.ledger, work.layout, spool, state.todo.number)
    encoder = ResultEncoder(work.layout, llm.model_facts)
    # a commit that failed frees no window: closing it ends the stream of prompts, and with it the loop
    committer = Committer(writer, done, failed=window.close)
    feed = Feed(plan, work.rows, work.layout, spool, window, recover, committer.submit, state.opened, {})
    with closing(committer), _answers(work, state, feed, llm) as completions, closing(window):
        for completion in completions:
            chunk = plan.chunk_of(completion.index)
            tally.add(completion)
            request = feed.requests.pop(completion.index, None)
            result = encoder.result(completion.index - plan.bases[chunk], completion.index, completion, request)
            if spool.add(chunk, encode_result(result)):
                committer.submit(chunk)
            if drain.requested or committer.failed or tally.too_many:
                break
        committer.finish(lambda: drain.requested)
    if state.committed < len(state.todo.chunks):
        drain.check()
        assert tally.too_many, "the engine ended before all rows were done"
        raise tally.refusal(tally.all_rows, tally.all_errors, "stopped; raise errors.max and run again to go on")


def _answers(
    work: PreparedJob, state: RunState, feed: Feed, llm: Answerer
) -> closing[Generator[Completion, None, None]]:
    """The engine at work; closing it stops the engine and its feeder."""
    prompts = feed.prompts(state.todo.chunks, work.spec.seed, llm.model_facts, work.spec.storage)
    return closing(llm.run(prompts))


def _run_open(work: PreparedJob, state: RunState) -> None:
    """Run this worker's chunks that no commit record names. Counts the errors of the others if a threshold is set."""
    listing, shard = work.ledger.listing(), state.worker.shard
    done = {key.chunk for key in listing.records}
    own = range(shard.index, len(work.plan.chunks), shard.count)
    todo = Pass(0, [chunk for chunk in own if chunk not in done], [chunk for chunk in own if chunk in done])
    if work.spec.errors.max is not None:
        for record in listing.read(CommitKey(chunk, 0) for chunk in todo.before):
            state.tally.before_rows += record.rows
            state.tally.before_errors += sum(record.errors.values())
    if todo.before:
        log.info("continuing", chunks_done=len(todo.before), chunks_open=len(todo.chunks))
    run_pass(work, state, todo, listing, lambda _: [])


def _save(window: Window, quiet: threading.Event, salvage: Salvage, state: RunState) -> None:
    """On a request to stop. The loop is given a moment to stop by itself; if it hangs, what is there is saved."""
    window.close()
    quiet.wait(_QUIET_S)
    try:
        salvage.save()
    finally:
        state.write_report(Drained("stopped by a signal with work left: run the same command again to continue"))


def _save_quietly(salvage: Salvage) -> None:
    try:
        salvage.save()
    except Exception as error:
        log.warning("the salvage could not be saved; its rows will be computed again", error=str(error))
