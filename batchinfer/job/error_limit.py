"""Whether a job that ran to its end has too many errors: more than `errors.max`, or without it nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from batchinfer.errors import shell_command
from batchinfer.job.inspect.show import rows_of_record
from batchinfer.job.ledger import CommitRecord, JobOutput
from batchinfer.job.prepare import PreparedJob
from batchinfer.job.run_state import RunState


def judge(work: PreparedJob, state: RunState) -> None:
    """Raises TooManyRowErrors. The whole output counts once it is complete, before that this worker's share of it.

    That nothing but errors is there is judged by what all workers have committed.
    """
    tally, manifest = state.tally, state.manifest
    rows, errors = tally.all_rows, tally.all_errors
    if manifest is not None:
        rows, errors = manifest["rows"], sum(manifest["errors"].values())
    elif tally.max_errors is None and rows == errors:
        rows, errors = _committed(work)
    if not tally.exceeds(rows, errors):
        return
    ending = f"the output is complete: {shell_command('show', work.ledger.store.url, '--errors')}"
    if manifest is None:
        ending = "other workers are not done"
    if tally.max_errors is None:
        ending += "; with errors.max: 100% that counts as done"
    raise tally.refusal(rows, errors, ending, "" if tally.examples else _first_error(work))


def _committed(work: PreparedJob) -> tuple[int, int]:
    """Rows and error rows of all workers, up to the first answer."""
    rows = errors = 0
    for record in _records(work):
        rows += record.rows
        errors += sum(record.errors.values())
        if errors < rows:
            break
    return rows, errors


def _first_error(work: PreparedJob) -> str:
    output = JobOutput(work.ledger.store, work.plan, work.spec, work.ledger)
    for record in _records(work):
        for shown in rows_of_record(output, work.layout, record, errors=True):
            error = shown.output["error"]
            return f"row {shown.row} of {shown.file}: {error['message'] if isinstance(error, dict) else error}"
    return ""


def _records(work: PreparedJob) -> Iterator[CommitRecord]:
    listing = work.ledger.listing()
    return listing.in_order(list(listing.in_effect().values()))
