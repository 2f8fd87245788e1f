"""manifest.json: totals of a finished output and the parts of all its chunks. Written and parsed here only.

`inspect/verify` has its own reading on purpose: an audit that shared this code would share its mistakes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import orjson

from batchinfer.errors import OutputConflict
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import begins_with, document
from batchinfer.job.ledger import CommitRecord
from batchinfer.job.plan import JobPlan

MANIFEST = "manifest.json"
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """Totals of a finished output, as of `pass_number`.

    parts: names of the parts in the order of the chunks; empty if only the totals were read.
    """

    fingerprint: str
    pass_number: int
    chunks: int
    rows: int
    output_rows: int
    ok: int
    prompt_tokens: int
    completion_tokens: int
    scored_tokens: int
    errors: dict[str, int]  # kind → rows
    size_bytes: int  # of all parts
    parts: tuple[str, ...] = ()

    @property
    def error_rows(self) -> int:
        return sum(self.errors.values())

    def totals(self) -> dict[str, Any]:
        """Return the manifest's JSON object without its parts."""
        sums = {name: getattr(self, name) for name in _SUMMED}
        head = {"fingerprint": self.fingerprint, "pass": self.pass_number, "chunks": self.chunks}
        return {**head, **sums, "errors": self.errors, "bytes": self.size_bytes}

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Raise OutputConflict for bytes that are not a manifest."""
        try:
            values = orjson.loads(data)
            entries = [entry["part"] for entry in values.get("parts", ())]
            numbers = {name: values[name] for name in ("chunks", *_SUMMED)}
            numbers |= {"pass_number": values["pass"], "size_bytes": values["bytes"]}
            if not all(type(number) is int for number in (*numbers.values(), *values["errors"].values())):
                raise ValueError("a count is not a whole number")
            parts = tuple(part for part in entries if part is not None)
            return cls(values["fingerprint"], errors=values["errors"], parts=parts, **numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputConflict(f"{where}: damaged ({error}); remove it and run the job again") from None


def read_manifest(store: Store, plan: JobPlan, with_parts: bool = True) -> Manifest | None:
    """Return the manifest, None before the job's end. Raises OutputConflict for a damaged one, or another job's.

    with_parts: False skips the parts without parsing them: there may be 100,000.
    """
    data = store.read(MANIFEST)
    if data is None:
        return None
    if not begins_with(data, plan.digest):
        raise foreign_object(store, MANIFEST)
    if not with_parts and data.endswith(_PARTS_END) and (end := data.find(_PARTS_BEGIN)) >= 0:
        data = data[:end] + b"\n}"
    return Manifest.from_bytes(data, f"{store.url}/{MANIFEST}")


def foreign_object(store: Store, name: str) -> OutputConflict:
    return OutputConflict(f"{store.url}/{name}: is not this job's: move it away and run the job again")


class ManifestBuilder:
    """Builds the manifest from commit records in any order; of each record only the text of its entry is kept."""

    def __init__(self, digest: str, pass_number: int, chunks: int) -> None:
        self._digest = digest
        self._pass_number = pass_number
        self._sums: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._bytes = 0
        self._entries = [b""] * chunks

    def add_record(self, record: CommitRecord) -> None:
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
        self._entries[record.chunk] = (b",\n" if record.chunk else b"\n") + text.encode()

    def build(self) -> tuple[Manifest, bytes]:
        """Return the manifest without its parts, and its bytes with them: as `document` would write the whole."""
        sums: dict[str, Any] = {name: self._sums[name] for name in _SUMMED}
        errors, chunks = dict(sorted(self._errors.items())), len(self._entries)
        manifest = Manifest(self._digest, self._pass_number, chunks, **sums, errors=errors, size_bytes=self._bytes)
        values = manifest.totals()
        head = document(values.pop("fingerprint"), values).removesuffix(b"\n}\n") + _PARTS_BEGIN
        return manifest, b"".join([head, *self._entries, _PARTS_END])
