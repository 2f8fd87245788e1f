"""The audit's reading of commit records, and of the manifest and the summaries that stand for them.

Every record is read, none is taken from a summary; few are in memory at once. Of each, the hash of its bytes and the
name of its part are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import zstandard

from batchinfer.io.storage import Store
from batchinfer.job.inspect.verify_report import Audit, Record
from batchinfer.job.prefetch import ahead, many_ahead

SUMMED = ("rows", "output_rows", "ok", "prompt_tokens", "completion_tokens", "scored_tokens", "bytes")
_LISTED = ("pass", "part", "bytes", "sha256", "rows", "output_rows")
_COMMIT = re.compile(r"commits/(\d{6,12})(?:\.r([1-9]\d{0,8}))?\.json", re.ASCII)
_SUMMARY = re.compile(r"summaries/\d{6,12}-\d+-\d+(?:\.r[1-9]\d*)?-([0-9a-f]+)\.jsonl\.zst", re.ASCII)
_AT_ONCE = 64
_SUMMARIES_AT_ONCE = 16
_SUMMARY_BYTES = 256 << 20
_NAMED = 3

Key = tuple[int, int]  # chunk, pass


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError."""
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def _name(key: Key) -> str:
    return f"commits/{key[0]:06d}.r{key[1]}.json" if key[1] else f"commits/{key[0]:06d}.json"


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A record as it was read; None and the reason where it is not one of the job."""

    key: Key
    record: Record | None
    digest: bytes
    problem: str = ""


class Commits:
    """The commit records of the job of `digest`; in effect is the highest pass up to the one of the manifest."""

    def __init__(
        self, store: Store, digest: Any, chunks: int, manifest: Mapping[str, Any] | None, result: Audit
    ) -> None:
        """List them. Objects without a place among them, and a retry pass that did not end, are differences."""
        self.parts: set[str | None] = set()  # what any record of the job names, superseded ones left out
        self.sums: Counter[str] = Counter()  # of the records in effect, once these were read, and so below
        self.errors: Counter[str] = Counter()
        self.missing: list[int] = []  # chunks without a record in effect
        self._store = store
        self._digest = digest
        self._chunks = chunks
        self._result = result
        self._listed = _entries(manifest)
        self._hashes: dict[Key, bytes | None] = {}  # of each record's bytes, None: not read yet
        last = manifest.get("pass") if manifest is not None else 0
        self._last = last if type(last) is int else 0
        for entry in store.scan("commits/"):
            match = _COMMIT.fullmatch(entry.name)
            key = (int(match[1]), int(match[2] or 0)) if match else (chunks, 0)
            if key[0] >= chunks or _name(key) != entry.name:
                result.note(entry.name, "is not a commit record of this job")
            else:
                self._hashes[key] = None
        for number in sorted({number for _, number in self._hashes if number > self._last}):
            result.note("commits/", f"retry pass {number} is not finished: run batchinfer retry again")

    @property
    def chosen(self) -> list[int]:
        """The chunks that have a record in effect, as far as names tell, ascending."""
        return sorted({chunk for chunk, number in self._hashes if number <= self._last})

    def in_effect(self) -> Iterator[tuple[int, Record | None]]:
        """Chunk by chunk of `chosen`, its record; None where it is damaged, which is a difference."""
        effect = {chunk: number for chunk, number in sorted(self._hashes) if number <= self._last}
        missing = set(range(self._chunks)) - effect.keys()
        for loaded in self._read(effect.items()):
            chunk = loaded.key[0]
            if loaded.record is None:
                missing.add(chunk)
            else:
                self._count(chunk, loaded.record)
            yield chunk, loaded.record
        self.missing = sorted(missing)
        for _ in self._read(sorted(key for key in self._hashes if key[1] > self._last)):
            pass  # for the parts that they name

    def _read(self, keys: Iterable[Key]) -> Iterator[_Loaded]:
        for loaded in many_ahead(self._load, keys, _AT_ONCE, self._store.batch):
            self._hashes[loaded.key] = loaded.digest
            if loaded.record is None:
                self._result.note(_name(loaded.key), loaded.problem)
            else:
                self.parts.add(loaded.record.part)
            yield loaded

    def _load(self, keys: list[Key]) -> list[_Loaded]:
        return list(map(self._loaded, keys, self._store.read_many(list(map(_name, keys)))))

    def _loaded(self, key: Key, data: bytes | None) -> _Loaded:
        name = _name(key)
        if data is None:
            return _Loaded(key, None, b"", "missing")
        digest = _hash(data)
        try:
            values = parse_object(data)
            counts = [values.get(name, 0) for name in SUMMED] + list((values.get("errors") or {}).values())
            if not all(type(count) is int for count in counts):
                raise ValueError("a count is not a whole number")
            if not isinstance(values.get("part"), str | None):
                raise ValueError("its part is not a name")
        except (ValueError, AttributeError) as error:
            return _Loaded(key, None, digest, f"damaged: {error}")
        if (values.get("chunk"), values.get("pass"), values.get("fingerprint")) != (*key, self._digest):
            return _Loaded(key, None, digest, "belongs to another chunk, pass or job")
        return _Loaded(key, Record(name, values), digest)

    def _count(self, chunk: int, record: Record) -> None:
        values = record.values
        self.sums.update({"chunks": 1, **{name: values.get(name, 0) for name in SUMMED}})
        self.errors.update(values.get("errors") or {})
        if self._listed is None:
            return
        entry = self._listed.pop(chunk, {})
        differing = [name for name in _LISTED if entry.get(name) != values.get(name)]
        if differing:
            self._result.note("manifest.json", f"chunk {chunk}: {', '.join(differing)} not as in {record.name}")

    # -- summaries ----------------------------------------------------------------------------------------------

    def check_summaries(self) -> None:
        """Each must hold the very bytes of its records; readers ignore an entry that does not."""
        names = sorted(entry.name for entry in self._store.scan("summaries/"))
        ours = [
            name for name in names if (match := _SUMMARY.fullmatch(name)) and str(self._digest).startswith(match[1])
        ]
        for name in sorted(set(names).difference(ours)):
            self._result.note(name, "is not a summary of this job")
        for name, data in ahead(lambda name: (name, self._store.read(name)), ours, _SUMMARIES_AT_ONCE):
            try:
                wrong = self._disagreeing(_lines(data, self._digest)) if data is not None else []
            except ValueError as error:
                self._result.note(name, f"damaged: {error}; readers ignore it, and it may be removed")
                continue
            if wrong:
                more = " and others" if len(wrong) > _NAMED else ""
                self._result.note(
                    name,
                    f"does not agree with {', '.join(wrong[:_NAMED])}{more}: readers take the records themselves, and "
                    "it may be removed",
                )

    def _disagreeing(self, lines: list[bytes]) -> list[str]:
        """Return the names of records whose bytes differ from the summary's. Raises ValueError."""
        found: dict[Key, bytes] = {}
        for line in lines:
            values = parse_object(line)
            chunk, number = values.get("chunk"), values.get("pass")
            if type(chunk) is not int or type(number) is not int:
                raise ValueError("a line is not a commit record")
            found[chunk, number] = _hash(line)
        superseded = [key for key in found if key in self._hashes and self._hashes[key] is None]
        for loaded in many_ahead(self._load, superseded, _AT_ONCE, self._store.batch):
            self._hashes[loaded.key] = loaded.digest
        return [_name(key) for key, digest in sorted(found.items()) if self._hashes.get(key) != digest]


def _entries(manifest: Mapping[str, Any] | None) -> dict[int, Mapping[str, Any]] | None:
    """Return the manifest's parts by chunk."""
    if manifest is None:
        return None
    parts = manifest.get("parts")
    entries = [entry for entry in parts if isinstance(entry, dict)] if isinstance(parts, list) else []
    return {entry["chunk"]: entry for entry in entries if type(entry.get("chunk")) is int}


def _lines(data: bytes, digest: Any) -> list[bytes]:
    """Return the records of a summary: compressed lines after one with the fingerprint. Raises ValueError."""
    try:
        if zstandard.frame_content_size(data) > _SUMMARY_BYTES:
            raise ValueError("it is too large")
        head, *lines = zstandard.ZstdDecompressor().decompress(data, _SUMMARY_BYTES).splitlines(keepends=True)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if parse_object(head).get("fingerprint") != digest:
        raise ValueError("it belongs to another job")
    return lines


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]
