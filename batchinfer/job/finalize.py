"""The end of a job: when every chunk is committed, the manifest, then _SUCCESS, then the sweep of what nobody names.

What is swept carries the plan's mark in its name; whatever else lies there belongs to somebody and stays. Any worker
that finds all commits does it; doing it twice, or at once, writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import orjson

from batchinfer.errors import OutputConflict
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import begins_with, document
from batchinfer.job.ledger import PARTS, CommitRecord, Ledger, is_part
from batchinfer.job.plan import JobPlan
from batchinfer.job.salvage import SALVAGE, is_journal
from batchinfer.job.summary_writer import compact
from batchinfer.log import log

MANIFEST = "manifest.json"
SUCCESS = "_SUCCESS"
_HASH_LINE = re.compile(rb"[0-9a-f]{64}\n?")
_SUMMED = ("rows", "output_rows", "ok", "prompt_tokens", "completion_tokens", "scored_tokens")
_PARTS_BEGIN = b',\n "parts": ['
_PARTS_END = b"\n ]\n}\n"
_PART = """\
  {
   "chunk": %d,
   "pass": %d,
   "part": %s,
   "bytes": %d,
   "sha256": %s,
   "rows": %d,
   "output_rows": %d
  }"""


def read_manifest(store: Store, plan: JobPlan) -> dict[str, Any] | None:
    """The manifest, None before the job's end. Raises OutputConflict for a damaged one, or another's."""
    data = _manifest_bytes(store, plan)
    return None if data is None else _parsed(data, store)


def read_totals(store: Store, plan: JobPlan) -> dict[str, Any] | None:
    """As `read_manifest`, without the parts: these may be many, and a whole manifest's are not parsed."""
    data = _manifest_bytes(store, plan)
    if data is None:
        return None
    end = data.find(_PARTS_BEGIN) if data.endswith(_PARTS_END) else -1
    totals = _parsed(data if end < 0 else data[:end] + b"\n}", store)
    return {name: value for name, value in totals.items() if name != "parts"}


def _manifest_bytes(store: Store, plan: JobPlan) -> bytes | None:
    data = store.read(MANIFEST)
    if data is not None and not begins_with(data, plan.digest):
        raise _foreign(store, MANIFEST)
    return data


def _parsed(data: bytes, store: Store) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = orjson.loads(data)
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


def finalise(ledger: Ledger, pass_number: int) -> dict[str, Any] | None:
    """Write manifest and _SUCCESS if every chunk is committed; returns its totals, None if chunks are open.

    Parts that the last manifest names stay until a new one stands.
    Raises OutputConflict, and sweeps nothing, if what stands under the names of manifest and _SUCCESS is another's.
    """
    store = ledger.store
    loose = {entry.name for entry in store.scan(PARTS)}  # before the commits: a part that comes later is not swept
    manifest = _gather(ledger, pass_number, loose)
    if manifest is None:
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
        raise _foreign(store, name)
    store.delete([name for name in store.find(SALVAGE) if is_journal(name, ledger.plan)])
    if pass_number == 0:
        store.delete(unnamed)  # plain readers take all of parts/ once _SUCCESS stands
    totals, data = manifest.totals, manifest.to_bytes()
    store.put(MANIFEST, data)
    store.put(SUCCESS, _hash(data).encode() + b"\n")
    store.delete(unnamed if pass_number else [])
    return totals


def _gather(ledger: Ledger, pass_number: int, loose: set[str]) -> _Manifest | None:
    """The manifest of all records in effect, None if chunks are open. Takes the parts that they name off `loose`."""
    listing = ledger.listing()
    effect = listing.in_effect(pass_number)
    if len(effect) < len(ledger.plan.chunks):
        return None
    compact(listing, pass_number)
    manifest = _Manifest(ledger.plan.digest, pass_number, len(effect))
    for record in listing.read(effect.values()):
        manifest.add(record)
        loose.discard(record.part or "")
    for record in listing.read(key for key in listing.records if key.pass_number > pass_number):
        loose.discard(record.part or "")  # of an interrupted retry
    return manifest


class _Manifest:
    """The manifest, made from records in any order: of each, only its text is kept."""

    def __init__(self, digest: str, pass_number: int, chunks: int) -> None:
        self._digest = digest
        self._fixed = {"pass": pass_number, "chunks": chunks}
        self._sums: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._bytes = 0
        self._parts = [b""] * chunks

    def add(self, record: CommitRecord) -> None:
        self._sums.update({name: getattr(record, name) for name in _SUMMED})
        self._errors.update(record.errors)
        self._bytes += record.size_bytes
        text = _PART % (
            record.chunk,
            record.pass_number,
            json.dumps(record.part),
            record.size_bytes,
            json.dumps(record.sha256),
            record.rows,
            record.output_rows,
        )
        self._parts[record.chunk] = (b",\n" if record.chunk else b"\n") + text.encode()

    @property
    def totals(self) -> dict[str, Any]:
        """All but the parts."""
        return {"fingerprint": self._digest, **self._values()}

    def to_bytes(self) -> bytes:
        """As `document` would write it."""
        head = document(self._digest, self._values()).removesuffix(b"\n}\n") + _PARTS_BEGIN
        return b"".join([head, *self._parts, _PARTS_END])

    def _values(self) -> dict[str, Any]:
        sums = {name: self._sums[name] for name in _SUMMED}
        return {**self._fixed, **sums, "errors": dict(sorted(self._errors.items())), "bytes": self._bytes}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
