"""The end of a job: when every chunk is committed, the manifest, then _SUCCESS, then the sweep of what nobody names.

What is swept carries the plan's mark in its name; whatever else lies there belongs to somebody and stays. Any worker
that finds all commits does it; doing it twice, or at once, writes the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Any

import orjson

from batchinfer.errors import OutputConflict
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import begins_with, document
from batchinfer.job.ledger import PARTS, CommitKey, CommitRecord, Ledger, is_part
from batchinfer.job.plan import JobPlan
from batchinfer.job.salvage import SALVAGE, is_journal
from batchinfer.log import log

MANIFEST = "manifest.json"
SUCCESS = "_SUCCESS"
_HASH_LINE = re.compile(rb"[0-9a-f]{64}\n?")


def read_manifest(store: Store, plan: JobPlan) -> dict[str, Any] | None:
    """The manifest, None before the job's end. Raises OutputConflict for a damaged one, or another's."""
    data = store.read(MANIFEST)
    if data is None:
        return None
    if not begins_with(data, plan.digest):
        raise _foreign(store, MANIFEST)
    try:
        manifest = orjson.loads(data)
        if not isinstance(manifest, dict) or type(manifest["pass"]) is not int:
            raise ValueError("not a manifest")
    except (ValueError, KeyError) as error:
        raise OutputConflict(f"{store.url}/{MANIFEST}: damaged ({error}); remove it and run the job again") from None
    return manifest


def is_finished(store: Store) -> bool:
    """Whether _SUCCESS stands and belongs to the manifest."""
    success, manifest = store.read(SUCCESS), store.read(MANIFEST)
    return (
        success is not None and manifest is not None and success.strip().decode("ascii", "replace") == _hash(manifest)
    )


def foreign_end(store: Store, plan: JobPlan) -> list[str]:
    """Which of manifest and _SUCCESS stand there and are not this job's."""
    manifest, success = store.read(MANIFEST), store.read(SUCCESS)
    found = [MANIFEST] if manifest is not None and not begins_with(manifest, plan.digest) else []
    return found + ([SUCCESS] if success is not None and not _HASH_LINE.fullmatch(success) else [])


def _foreign(store: Store, name: str) -> OutputConflict:
    return OutputConflict(f"{store.url}/{name}: is not this job's: move it away and run the job again")


def finalise(
    ledger: Ledger, pass_number: int, known: dict[CommitKey, CommitRecord] | None = None
) -> dict[str, Any] | None:
    """Write manifest and _SUCCESS if every chunk is committed; returns the manifest, None if chunks are open.

    `known`: records that need not be read again. Parts that the last manifest names stay until a new one stands.
    Raises OutputConflict, and sweeps nothing, if what stands under the names of manifest and _SUCCESS is another's.
    """
    store = ledger.store
    found = store.find(PARTS)  # before the commits: a part that comes later is none of ours to sweep
    listed = ledger.listed()
    effect = {key.chunk: key for key in listed if key.pass_number <= pass_number}
    if len(effect) < len(ledger.plan.chunks):
        return None
    known = known or {}
    missing = [key for key in effect.values() if key not in known]
    read = dict(zip(missing, ledger.read_all(missing), strict=True))
    records = [known.get(key) or read[key] for _, key in sorted(effect.items())]
    data = _manifest(ledger.plan.digest, pass_number, records)
    later = ledger.read_all(key for key in listed if key.pass_number > pass_number)  # of an interrupted retry
    loose = sorted(found.keys() - {record.part for record in (*records, *later)})
    unnamed = [name for name in loose if is_part(name, ledger.plan)]
    if foreign := [name for name in loose if not is_part(name, ledger.plan)]:
        log.warning(
            "parts/ holds what this job did not write: readers of the whole folder take it for results",
            output=store.url,
            objects=len(foreign),
            first=foreign[0],
        )
    for name in foreign_end(store, ledger.plan):
        raise _foreign(store, name)
    store.delete([name for name in store.find(SALVAGE) if is_journal(name, ledger.plan)])
    if pass_number == 0:
        store.delete(unnamed)  # plain readers take all of parts/ once _SUCCESS stands
    store.put(MANIFEST, data)
    store.put(SUCCESS, _hash(data).encode() + b"\n")
    store.delete(unnamed if pass_number else [])
    manifest: dict[str, Any] = orjson.loads(data)
    return manifest


def _manifest(digest: str, pass_number: int, records: list[CommitRecord]) -> bytes:
    errors: Counter[str] = Counter()
    for record in records:
        errors.update(record.errors)
    totals = {
        name: sum(getattr(record, name) for record in records)
        for name in ("rows", "output_rows", "ok", "prompt_tokens", "completion_tokens", "scored_tokens")
    }
    parts = [
        {
            "chunk": record.chunk,
            "pass": record.pass_number,
            "part": record.part,
            "bytes": record.size_bytes,
            "sha256": record.sha256,
            "rows": record.rows,
            "output_rows": record.output_rows,
        }
        for record in records
    ]
    values = {
        "pass": pass_number,
        "chunks": len(records),
        **totals,
        "errors": dict(sorted(errors.items())),
        "bytes": sum(record.size_bytes for record in records),
        "parts": parts,
    }
    return document(digest, values)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
