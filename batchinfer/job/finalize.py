"""The end of a job: once every chunk is committed, write the manifest and _SUCCESS, and sweep what no record names.

What is swept carries the plan's mark in its name; everything else belongs to somebody and stays. Any worker that finds
all commits does it. It is idempotent: done twice, or by two workers at once, it writes the same bytes.
"""

from __future__ import annotations

import hashlib
import re

from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import begins_with
from batchinfer.job.ledger import PARTS, Ledger, is_part
from batchinfer.job.manifest import MANIFEST, Manifest, ManifestBuilder, foreign_object
from batchinfer.job.plan import JobPlan
from batchinfer.job.salvage import SALVAGE, is_journal
from batchinfer.job.summary_writer import compact
from batchinfer.log import log

SUCCESS = "_SUCCESS"
_HASH_LINE = re.compile(rb"[0-9a-f]{64}\n?")


def is_finished(store: Store) -> bool:
    """Return True if _SUCCESS exists and holds the hash of the manifest."""
    success, manifest = store.read(SUCCESS), store.read(MANIFEST)
    return (
        success is not None and manifest is not None and success.strip().decode("ascii", "replace") == _hash(manifest)
    )


def foreign_end(store: Store, plan: JobPlan) -> list[str]:
    """Return the names of manifest and _SUCCESS that exist and are not this job's."""
    manifest, success = store.read(MANIFEST), store.read(SUCCESS)
    found = [MANIFEST] if manifest is not None and not begins_with(manifest, plan.digest) else []
    return found + ([SUCCESS] if success is not None and not _HASH_LINE.fullmatch(success) else [])


def finish_output(ledger: Ledger, pass_number: int) -> Manifest | None:
    """Write manifest and _SUCCESS if every chunk is committed; return the totals, None if chunks are open.

    Parts that the last manifest names stay until a new one stands.
    Raises OutputConflict, and sweeps nothing, if what stands under the names of manifest and _SUCCESS is another's.
    """
    store = ledger.store
    loose = {entry.name for entry in store.scan(PARTS)}  # before the commits: a part that comes later is not swept
    builder = _build_manifest(ledger, pass_number, loose)
    if builder is None:
        return None
    unnamed = [name for name in sorted(loose) if is_part(name, ledger.plan)]
    if foreign := [name for name in sorted(loose) if not is_part(name, ledger.plan)]:
        log.warning(
            "parts/ holds what this job did not write: readers of the whole folder take it for results",
            output=store.url,
            objects=len(foreign),
            first=foreign[0],
        )
    for name in foreign_end(store, ledger.plan):
        raise foreign_object(store, name)
    store.delete([name for name in store.find(SALVAGE) if is_journal(name, ledger.plan)])
    if pass_number == 0:
        store.delete(unnamed)  # plain readers take all of parts/ once _SUCCESS stands
    manifest, data = builder.build()
    store.put(MANIFEST, data)
    store.put(SUCCESS, _hash(data).encode() + b"\n")
    store.delete(unnamed if pass_number else [])
    return manifest


def _build_manifest(ledger: Ledger, pass_number: int, loose: set[str]) -> ManifestBuilder | None:
    """Add all records in effect, None if chunks are open. Removes the parts that they name from `loose`."""
    listing = ledger.listing()
    effect = listing.in_effect(pass_number)
    if len(effect) < len(ledger.plan.chunks):
        return None
    compact(listing, pass_number)
    builder = ManifestBuilder(ledger.plan.digest, pass_number, len(effect))
    for record in listing.read(effect.values()):
        builder.add_record(record)
        loose.discard(record.part or "")
    for record in listing.read(key for key in listing.records if key.pass_number > pass_number):
        loose.discard(record.part or "")  # of an interrupted retry
    return builder


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
