"""The error threshold of a job that ran to its end: more errors than `errors.max`, or without it nothing but errors."""

from __future__ import annotations

from collections.abc import Iterator

from batchinfer.errors import shell_command
from batchinfer.job.inspect.show import rows_of_record
from batchinfer.job.ledger import CommitRecord, JobOutput
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.run_state import RunCounts


def refuse_too_many_errors(job: PreparedJob, counts: RunCounts) -> None:
    """Raise TooManyRowErrors. The whole output counts once it is complete, before that this worker's share of it.

    If there are nothing but errors, what all workers have committed decides.
    """
    tally, manifest = counts.tally, counts.manifest
    rows, errors = tally.all_rows, tally.all_errors
    if manifest is not None:
        rows, errors = manifest.rows, manifest.error_rows
    elif tally.max_errors is None and rows == errors:
        rows, errors = _committed(job)
    if not tally.exceeds(rows, errors):
        return
    ending = f"the output is complete: {shell_command('show', job.ledger.store.url, '--errors')}"
    if manifest is None:
        ending = "other workers are not done"
    if tally.max_errors is None:
        ending += "; set errors.max: 100% to accept this"
    raise tally.refusal(rows, errors, ending, "" if tally.examples else _first_error(job))


def _committed(job: PreparedJob) -> tuple[int, int]:
    """Return rows and error rows of all workers, up to the first answer."""
    rows = errors = 0
    for record in _records(job):
        rows += record.rows
        errors += sum(record.errors.values())
        if errors < rows:
            break
    return rows, errors


def _first_error(job: PreparedJob) -> str:
    output = JobOutput(job.ledger.store, job.plan, job.spec, job.ledger)
    for record in _records(job):
        for shown in rows_of_record(output, job.layout, record, errors=True):
            error = shown.output["error"]
            return f"row {shown.row} of {shown.file}: {error['message'] if isinstance(error, dict) else error}"
    return ""


def _records(job: PreparedJob) -> Iterator[CommitRecord]:
    listing = job.ledger.listing()
    return listing.in_order(list(listing.in_effect().values()))
