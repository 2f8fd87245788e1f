"""An audit of an output: its own reading of plan, commit records, parts and totals, not that of the run.

What it holds: every input row that the job covers has exactly one output (or one per sample), in exactly one part that
a commit record names, beside the text and numbers that the input has there; every part has the size, hash and counts of
its record; manifest, `_SUCCESS` and summaries agree with them; nothing else lies in parts/; the inputs are as planned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from batchinfer.errors import InputMissing
from batchinfer.io.storage import Store
from batchinfer.job.inspect.verify_commits import SUMMED, Commits, parse_object
from batchinfer.job.inspect.verify_report import Audit, Chunk, PlannedOutput, name_spans
from batchinfer.job.inspect.verify_rows import Reach, check_parts
from batchinfer.spec import JobSpec, StorageSpec


def audit(url: str, storage: StorageSpec, spec: JobSpec | None = None) -> Audit:
    """Audit the output at `url`. `storage` reaches it and the inputs; the default means the job's own for the inputs.

    `spec`: the job as its file has it now; the input is read where that says, if it is the same there.

    Raises InputMissing where no job has written. Everything else that is wrong is a difference in the result.
    """
    store = Store.open(url, storage)
    result = Audit(store.url)
    plan = _read_json(store, "plan.json", result)
    job = _read_json(store, "job.json", result)
    if plan is None:
        if store.read("plan.json") is None:
            raise InputMissing(f"{store.url} holds no plan.json: no job has written there")
        return result
    try:
        layout = PlannedOutput.of(plan, job or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        result.note("plan.json", f"damaged: {error!r}")
        return result
    if plan.get("digest") != _digest(plan.get("fingerprint")):
        result.note("plan.json", "its digest is not that of its fingerprint")
    manifest = _read_json(store, "manifest.json", result)
    commits = Commits(store, plan.get("digest"), len(layout.chunks), manifest, result)
    if storage == StorageSpec():
        storage = _job_storage(job or {})
    check_parts(store, Reach(storage, spec), layout, commits, result)
    _note_missing_chunks([layout.chunks[number] for number in commits.missing], result)
    _check_names(store, commits, result)
    commits.check_summaries()
    _check_end(manifest, store, commits, result)
    return result


def _read_json(store: Store, name: str, result: Audit) -> dict[str, Any] | None:
    data = store.read(name)
    if data is None:
        result.note(name, "missing")
        return None
    try:
        return parse_object(data)
    except ValueError as error:
        result.note(name, f"damaged: {error}")
        return None


def _job_storage(job: Mapping[str, Any]) -> StorageSpec:
    try:
        return StorageSpec(**job["storage"])
    except (KeyError, TypeError, ValueError):
        return StorageSpec()


def _digest(fingerprint: Any) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _note_missing_chunks(missing: list[Chunk], result: Audit) -> None:
    for url, group in groupby(missing, key=lambda chunk: chunk.url):
        gap = list(group)
        rows = name_spans((chunk.start, chunk.stop) for chunk in gap)
        numbers = name_spans((chunk.number, chunk.number + 1) for chunk in gap)
        result.note(url, f"rows {rows} have no output: chunks {numbers} are not committed")


# -- the end ----------------------------------------------------------------------------------------------------


def _check_names(store: Store, commits: Commits, result: Audit) -> None:
    """Note files in parts/ that no record names: everyone who reads parts/* would read them."""
    for name in sorted(entry.name for entry in store.scan("parts/") if entry.name not in commits.parts):
        result.note(name, "no commit record names it")


def _check_end(manifest: dict[str, Any] | None, store: Store, commits: Commits, result: Audit) -> None:
    """Manifest and _SUCCESS, which stand for the commit records."""
    if manifest is None:
        return
    expected: dict[str, Any] = {name: commits.sums[name] for name in (*SUMMED, "chunks")}
    expected["errors"] = dict(commits.errors)
    for name, value in expected.items():
        if manifest.get(name) != value:
            result.note("manifest.json", f"{name} is {manifest.get(name)}, and the commit records have {value}")
    data, success = store.read("manifest.json") or b"", store.read("_SUCCESS")
    if success is None:
        result.note("_SUCCESS", "missing")
    elif success.decode("ascii", "replace").strip() != hashlib.sha256(data).hexdigest():
        result.note("_SUCCESS", "is not the sha256 of manifest.json")


def describe_audit(found: Audit) -> str:
    """Return the audit as lines for a person, one per difference."""
    lines = [
        f"{'output':<10} {found.url}",
        f"{'read':<10} {found.chunks:,} chunks, {found.parts:,} parts, {found.bytes:,} bytes",
        f"{'rows':<10} {found.rows:,} input rows with exactly one output",
        f"{'verdict':<10} {'no difference' if not found.differences else f'{len(found.differences):,} differences'}",
    ]
    return "\n".join([*lines, *(f"  {difference}" for difference in found.differences)])
