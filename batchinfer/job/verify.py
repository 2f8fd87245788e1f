"""An audit of an output: its own reading of plan, commit records, parts and totals, not that of the run.

What it holds: every input row that the job covers has exactly one output (or one per sample), in exactly one part that
a commit record names, beside the text and numbers that the input has there; every part has the size, hash and counts of
its record; manifest and `_SUCCESS` agree with them; nothing else lies in parts/; the inputs are as they were planned.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from batchinfer.errors import InputMissing
from batchinfer.io.storage import Store
from batchinfer.job.audit import Audit, Chunk, Layout, Record, name_spans
from batchinfer.job.audit_rows import Reach, check_parts
from batchinfer.spec import JobSpec, StorageSpec

_COMMIT = re.compile(r"commits/(\d+)(?:\.r(\d+))?\.json")
_SUMMED = ("rows", "output_rows", "ok", "prompt_tokens", "completion_tokens", "scored_tokens", "bytes")
_LISTED = ("pass", "part", "bytes", "sha256", "rows", "output_rows")
_READERS = 16


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
        layout = Layout.of(plan, job or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        result.note("plan.json", f"damaged: {error!r}")
        return result
    if plan.get("digest") != _digest(plan.get("fingerprint")):
        result.note("plan.json", "its digest is not that of its fingerprint")
    manifest = _read_json(store, "manifest.json", result)
    commits = _read_commits(store, plan.get("digest"), len(layout.chunks), manifest, result)
    _note_missing_chunks(layout.chunks, commits.in_effect, result)
    if storage == StorageSpec():
        storage = _job_storage(job or {})
    check_parts(store, Reach(storage, spec), layout, commits.in_effect, result)
    _check_names(store, commits, result)
    _check_end(manifest, store, commits, result)
    return result


def _read_json(store: Store, name: str, result: Audit) -> dict[str, Any] | None:
    data = store.read(name)
    if data is None:
        result.note(name, "missing")
        return None
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except ValueError as error:
        result.note(name, f"damaged: {error}")
        return None
    return values


def _job_storage(job: Mapping[str, Any]) -> StorageSpec:
    try:
        return StorageSpec(**job["storage"])
    except (KeyError, TypeError, ValueError):
        return StorageSpec()


def _digest(fingerprint: Any) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


# -- commit records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Commits:
    """Chunk → its record in effect, ascending. `parts`: what any record of the job names, superseded ones left out."""

    in_effect: dict[int, Record]
    parts: set[str | None]


def _read_commits(
    store: Store, digest: Any, chunks: int, manifest: Mapping[str, Any] | None, result: Audit
) -> _Commits:
    """In effect is the highest pass, up to the one that the manifest stands for.

    Records that are damaged or of another job are differences, and so is a retry pass that was begun and not ended.
    """
    names: dict[tuple[int, int], str] = {}
    for name in store.find("commits/"):
        match = _COMMIT.fullmatch(name)
        if match is None or int(match[1]) >= chunks:
            result.note(name, "is not a commit record of this job")
        else:
            names[int(match[1]), int(match[2] or 0)] = name
    last = manifest.get("pass", 0) if manifest is not None else 0
    chosen = {chunk: number for chunk, number in sorted(names) if number <= last}
    unfinished = sorted(key for key in names if key[1] > last)
    wanted = [*chosen.items(), *unfinished]
    with ThreadPoolExecutor(_READERS) as pool:
        read = dict(zip(wanted, pool.map(lambda key: _read_json(store, names[key], result), wanted), strict=True))
    records: dict[tuple[int, int], Record] = {}
    for key, values in read.items():
        if values is None:
            continue
        if (values.get("chunk"), values.get("pass"), values.get("fingerprint")) == (*key, digest):
            records[key] = Record(names[key], values)
        else:
            result.note(names[key], "belongs to another chunk, pass or job")
    for number in sorted({number for _, number in unfinished}):
        result.note("commits/", f"retry pass {number} is not finished: run batchinfer retry again")
    in_effect = {key[0]: records[key] for key in sorted(chosen.items()) if key in records}
    return _Commits(in_effect, {record.part for record in records.values()})


def _note_missing_chunks(chunks: list[Chunk], records: Mapping[int, Record], result: Audit) -> None:
    missing = [chunk for chunk in chunks if chunk.number not in records]
    for url, group in groupby(missing, key=lambda chunk: chunk.url):
        gap = list(group)
        rows = name_spans((chunk.start, chunk.stop) for chunk in gap)
        numbers = name_spans((chunk.number, chunk.number + 1) for chunk in gap)
        result.note(url, f"rows {rows} have no output: chunks {numbers} are not committed")


# -- the end ----------------------------------------------------------------------------------------------------


def _check_names(store: Store, commits: _Commits, result: Audit) -> None:
    """A file in parts/ that no record names would be read by everyone who reads parts/*."""
    for name in store.find("parts/"):
        if name not in commits.parts:
            result.note(name, "no commit record names it")


def _check_end(manifest: dict[str, Any] | None, store: Store, commits: _Commits, result: Audit) -> None:
    """Manifest and _SUCCESS, which stand for the commit records."""
    if manifest is None:
        return
    records = commits.in_effect
    errors: Counter[str] = Counter()
    for record in records.values():
        errors.update(record.values.get("errors") or {})
    expected: dict[str, Any] = {name: sum(r.values.get(name, 0) for r in records.values()) for name in _SUMMED}
    expected |= {"chunks": len(records), "errors": dict(errors)}
    for name, value in expected.items():
        if manifest.get(name) != value:
            result.note("manifest.json", f"{name} is {manifest.get(name)}, and the commit records have {value}")
    listed = {entry.get("chunk"): entry for entry in manifest.get("parts", []) if isinstance(entry, dict)}
    for number, record in records.items():
        entry = listed.get(number, {})
        differing = [name for name in _LISTED if entry.get(name) != record.values.get(name)]
        if differing:
            result.note("manifest.json", f"chunk {number}: {', '.join(differing)} not as in {record.name}")
    data, success = store.read("manifest.json") or b"", store.read("_SUCCESS")
    if success is None:
        result.note("_SUCCESS", "missing")
    elif success.decode("ascii", "replace").strip() != hashlib.sha256(data).hexdigest():
        result.note("_SUCCESS", "is not the sha256 of manifest.json")


def describe(found: Audit) -> str:
    """The audit as lines for a person; each difference is one."""
    lines = [
        f"{'output':<10} {found.url}",
        f"{'read':<10} {found.chunks:,} chunks, {found.parts:,} parts, {found.bytes:,} bytes",
        f"{'rows':<10} {found.rows:,} input rows with exactly one output",
        f"{'verdict':<10} {'no difference' if not found.differences else f'{len(found.differences):,} differences'}",
    ]
    return "\n".join([*lines, *(f"  {difference}" for difference in found.differences)])
