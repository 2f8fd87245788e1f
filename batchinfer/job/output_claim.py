"""Check before anything is written that an output is free for a job: what is not ours is never overwritten.

Ours are the plan and what its digest marks. Where no plan stands nothing is ours, and then nothing may lie where the
job's objects go; what lies elsewhere in the output is nobody's business.
"""

from __future__ import annotations

from itertools import islice

from batchinfer.errors import OutputConflict
from batchinfer.io.storage import Store, check_names
from batchinfer.job.finalize import SUCCESS, foreign_end
from batchinfer.job.fingerprint import begins_with
from batchinfer.job.ledger import COMMITS, JOB, PARTS
from batchinfer.job.manifest import MANIFEST
from batchinfer.job.plan import PLAN, JobPlan
from batchinfer.job.salvage import SALVAGE
from batchinfer.job.summaries import SUMMARIES

FOLDERS = (PARTS, COMMITS, SUMMARIES, SALVAGE)
_SHOWN = 3


def find_plan(store: Store, report: str) -> JobPlan | None:
    """Return the output's plan, None for an output that is free. `report`: the name of this worker's report.

    Raises OutputConflict for an output that holds something else where the job's objects go.
    """
    check_names(store.url, [folder.rstrip("/") for folder in FOLDERS], [PLAN, JOB, MANIFEST, SUCCESS, report])
    data = store.read(PLAN)
    if data is None:
        found = _occupied(store, report)
        if not found:
            return None
        data = store.read(PLAN)  # another worker may have begun the job meanwhile
        if data is None:
            raise _conflict(store, f"no {PLAN} of this job stands there", found)
    plan = JobPlan.from_bytes(data, f"{store.url}/{PLAN}")
    written = store.read(report)
    found = foreign_end(store, plan)
    if written is not None and not begins_with(written, plan.digest):
        found.append(report)
    if found:
        raise _conflict(store, f"they are not of the job whose {PLAN} stands there", found)
    return plan


def _occupied(store: Store, report: str) -> list[str]:
    """Return the first names of objects that have a place of ours."""
    files = [name for name in (JOB, MANIFEST, SUCCESS, report) if store.read(name) is not None]
    listed = (entry.name for folder in FOLDERS for entry in store.scan(folder))
    return [*files, *islice(listed, _SHOWN + 1)]


def _conflict(store: Store, why: str, found: list[str]) -> OutputConflict:
    named = ", ".join(found[:_SHOWN])
    more = " and more" if len(found) > _SHOWN else ""
    return OutputConflict(
        f"{store.url}: holds {named}{more} where this job would write, and {why}: move them away, or use another "
        "output.path"
    )
