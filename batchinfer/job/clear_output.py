"""The end of an output that nobody needs any more: what is the job's goes, and with it the folders that are empty."""

from __future__ import annotations

from pathlib import Path

from batchinfer.errors import OutputConflict
from batchinfer.io.storage import LocalStore
from batchinfer.job.finalize import SUCCESS, foreign_end
from batchinfer.job.ledger import JOB, commit_key, is_part
from batchinfer.job.manifest import MANIFEST
from batchinfer.job.output_claim import FOLDERS
from batchinfer.job.plan import PLAN, JobPlan
from batchinfer.job.report import report_name
from batchinfer.job.salvage import is_journal
from batchinfer.job.shard import Shard
from batchinfer.job.summaries import stretch_of
from batchinfer.log import log


def clear_output(folder: Path) -> None:
    """Delete the output of a job of one worker that runs no more. What was interrupted is continued by the next call.

    What does not carry the mark of the plan is somebody else's and stays, with its folder.
    """
    store = LocalStore(str(folder), folder)
    data = store.read(PLAN)
    if data is not None:
        try:
            plan = JobPlan.from_bytes(data)
        except OutputConflict as error:
            log.warning("output not deleted: it cannot be told which job wrote it", output=store.url, why=str(error))
            return
        store.delete([*_own(store, plan), PLAN])  # the plan last: it says what is whose
    store.remove_folders([*(name.rstrip("/") for name in FOLDERS), ""])


def _own(store: LocalStore, plan: JobPlan) -> list[str]:
    names = store.find()
    end = {JOB, MANIFEST, SUCCESS}.difference(foreign_end(store, plan))
    marked = (is_part, is_journal, stretch_of)
    named = [name for name in names if name in end or any(marks(name, plan) for marks in marked)]
    # the others have the digest in them
    documents = [name for name in names if commit_key(name) or name == report_name(Shard())]
    return named + [name for name in documents if plan.digest.encode() in (store.read(name) or b"")]
