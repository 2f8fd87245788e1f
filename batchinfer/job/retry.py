"""A retry pass: rows that ended with a retryable error run again, and their results replace theirs.

Pass p writes a chunk anew, the kept rows and the new ones, and commits it as `<chunk>.r<p>.json`. Until the new
manifest stands, the parts of the last one stay; the highest pass of a chunk is in effect, so that a reader of commits
sees every row once at any moment. An interrupted pass continues with the same command.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from batchinfer.errors import RETRYABLE_KINDS, OutputConflict, UsageError
from batchinfer.job.drain import Drain
from batchinfer.job.error_limit import refuse_too_many_errors
from batchinfer.job.finalize import finish_output, is_finished
from batchinfer.job.ledger import CommitRecord, Listing
from batchinfer.job.manifest import Manifest, read_manifest
from batchinfer.job.openai_lines import results_of_lines
from batchinfer.job.part_reader import read_part
from batchinfer.job.part_table import results_of_part
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.report import Progress, Report, Silent
from batchinfer.job.results import RowResult
from batchinfer.job.run import JobRun
from batchinfer.job.run_state import Dependencies, Pass, Worker
from batchinfer.job.shard import Shard
from batchinfer.log import log
from batchinfer.spec import JobSpec


def retry_job(
    spec: JobSpec,
    *,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    spool_dir: Path | None = None,
    drain: Drain | None = None,
    progress: Progress | None = None,
    dependencies: Dependencies = Dependencies(),  # noqa: B008 - frozen
) -> Report:
    """Run a new pass over a finished output, or continue one. Returns the report that also stands beside the output.

    Raises UsageError for an output that is not finished, and what `run_job` raises.
    """
    run = JobRun(spec, Worker(shard, spool_dir, drain or Drain(), progress or Silent(), dependencies))
    counts = run.counts
    with run.reporter.reporting():
        job = run.begin()
        counts.manifest = _finished_manifest(job)
        number = counts.manifest.pass_number + 1
        listing = job.ledger.listing()
        failed = _failed_chunks(listing, number)
        if not failed:
            log.info("nothing to retry: no row ended with a retryable error", kinds=sorted(RETRYABLE_KINDS))
            counts.manifest = finish_output(job.ledger, number - 1)  # the last pass may have stopped while it swept
        else:
            done = listing.of_pass(number)
            own = [chunk for chunk in failed if shard.owns(chunk)]
            todo = Pass(number, [chunk for chunk in own if chunk not in done], [c for c in own if c in done])
            run.run_pass(job, todo, listing, lambda chunk: _kept_results(job, failed[chunk]))
            counts.clock.enter("finishing")
            done = job.ledger.listing().of_pass(number)
            counts.manifest = finish_output(job.ledger, number) if done >= failed.keys() else None
        refuse_too_many_errors(job, counts)
    return run.reporter.report(None)


def _finished_manifest(job: PreparedJob) -> Manifest:
    """Return the manifest of the last pass; a pass that was stopped while it wrote it is brought to its end.

    Raises UsageError if the job is not finished.
    """
    store = job.ledger.store
    manifest = read_manifest(store, job.plan, with_parts=False)
    if manifest is not None and not is_finished(store):
        manifest = finish_output(job.ledger, manifest.pass_number)
    if manifest is None:
        raise UsageError(
            f"{store.url}: the job is not finished, there is nothing to retry yet: run it to its end first"
        )
    return manifest


def _failed_chunks(listing: Listing, number: int) -> dict[int, CommitRecord]:
    """Chunks with retryable errors as they were before pass `number`, ascending."""
    records = listing.read(listing.in_effect(number - 1).values())
    failed = {record.chunk: record for record in records if RETRYABLE_KINDS & record.errors.keys()}
    return dict(sorted(failed.items()))


def _kept_results(job: PreparedJob, record: CommitRecord) -> list[RowResult]:
    """Return the results that the pass leaves as they are. Raises OutputConflict for a part that was altered."""
    store, plan = job.ledger.store, job.plan
    assert record.part is not None, "a part without rows has no errors"
    data = store.read(record.part)
    if data is None or hashlib.sha256(data).hexdigest() != record.sha256:
        raise OutputConflict(f"{store.url}/{record.part}: gone or altered since it was committed; see verify")
    values = read_part(data, record.part)
    if job.layout.format == "openai-batch":
        rows = results_of_lines(values, plan.bases[record.chunk])
    else:
        rows = results_of_part(job.layout, values, plan.chunks[record.chunk].start)
    kept = [row for row in rows if row.failure is None or row.failure.kind not in RETRYABLE_KINDS]
    return _with_scored(kept, record.scored_tokens)


def _with_scored(rows: list[RowResult], tokens: int) -> list[RowResult]:
    """Give the first row without an error all scored tokens: a part does not say how many each row has."""
    first = next((place for place, row in enumerate(rows) if row.failure is None), None)
    if first is not None and tokens:
        rows[first] = rows[first]._replace(scored_tokens=tokens)
    return rows
