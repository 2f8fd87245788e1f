"""Commit records on storage: the only truth about what is done, for readers, resume and `verify`.

A chunk is done when its commit record exists. A record is put-if-absent, names a part that was uploaded whole before,
and never changes; a retry pass p adds `<chunk>.r<p>.json`, and the highest pass of a chunk is in effect.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import orjson

from batchinfer.errors import InputMissing, OutputConflict, SpecError
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import ENGINE_DECIDES
from batchinfer.job.plan import JobPlan, load_plan
from batchinfer.job.prefetch import ahead, many_ahead
from batchinfer.job.summaries import SUMMARIES, Entry, Stretch, cover, decode, stretch_of
from batchinfer.log import log
from batchinfer.spec import JobSpec, StorageSpec, parse_spec

COMMITS = "commits/"
PARTS = "parts/"
JOB = "job.json"
_COMMIT_NAME = re.compile(r"commits/(\d{6,12})(?:\.r([1-9]\d{0,8}))?\.json", re.ASCII)
_PART_NAME = re.compile(r"parts/part-(\d{6,})-([0-9a-f]+)-[0-9a-f]{16}\.(?:parquet|jsonl(?:\.gz|\.zst)?)", re.ASCII)
_RECORDS_AT_ONCE = 64  # small: latency, not bandwidth
_SUMMARIES_AT_ONCE = 16
_COUNTS = attrgetter(
    *("chunk", "pass_number", "size_bytes", "rows", "output_rows", "ok"),
    *("prompt_tokens", "completion_tokens", "scored_tokens"),
)


class CommitKey(NamedTuple):
    """Chunk and pass that a commit record is for."""

    chunk: int
    pass_number: int  # 0: the run itself; p ≥ 1: the p-th retry pass

    @property
    def name(self) -> str:
        retry = f".r{self.pass_number}" if self.pass_number else ""
        return f"{COMMITS}{self.chunk:06d}{retry}.json"


def commit_key(name: str) -> CommitKey | None:
    """Return the chunk and pass whose record may have this name, None for other names.

    The content says whose record it is.
    """
    match = _COMMIT_NAME.fullmatch(name)
    key = CommitKey(int(match[1]), int(match[2] or 0)) if match else None
    return key if key is not None and key.name == name else None


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Result of a chunk. Deterministic: no times, no worker. `part` is None where no row was selected."""

    chunk: int
    pass_number: int
    fingerprint: str  # the plan's digest
    part: str | None  # name below the output
    size_bytes: int
    sha256: str  # of the whole part, hex
    rows: int  # input rows that were selected
    output_rows: int  # rows of the part: more than `rows` where samples are rows
    ok: int
    errors: dict[str, int]  # kind → rows
    prompt_tokens: int
    completion_tokens: int
    scored_tokens: int  # of continuations and texts, by the tasks that score

    @property
    def key(self) -> CommitKey:
        return CommitKey(self.chunk, self.pass_number)

    def to_bytes(self) -> bytes:
        values = dataclasses.asdict(self)
        values["pass"] = values.pop("pass_number")
        values["bytes"] = values.pop("size_bytes")
        return json.dumps(values, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> CommitRecord:
        try:
            values: dict[str, Any] = orjson.loads(data)
            values["pass_number"] = values.pop("pass")
            values["size_bytes"] = values.pop("bytes")
            record = cls(**values)
            if not all(type(number) is int for number in (*_COUNTS(record), *record.errors.values())):
                raise ValueError("a count is not a whole number")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputConflict(f"{where}: not a commit record ({error}); restore it from a copy") from None
        return record


def part_name(plan: JobPlan, chunk: int, sha256: str, suffix: str) -> str:
    return f"{PARTS}part-{chunk:06d}-{plan.mark}-{sha256[:16]}{suffix}"


def is_part(name: str, plan: JobPlan) -> bool:
    """Return True if a job of this plan may have written the object: only `part_name` gives such names."""
    match = _PART_NAME.fullmatch(name)
    return match is not None and match[2] == plan.mark and f"{int(match[1]):06d}" == match[1]


class Ledger:
    """Reads and writes the commit records of one plan."""

    def __init__(self, store: Store, plan: JobPlan) -> None:
        self.store = store
        self.plan = plan

    def listing(self) -> Listing:
        """List all records that exist now."""
        stretches = {stretch_of(entry.name, self.plan) for entry in self.store.scan(SUMMARIES)}
        records: dict[CommitKey, tuple[int, str | None]] = {}
        for name, size, mark in self.store.scan(COMMITS):
            key = commit_key(name)
            if key is not None and key.chunk < len(self.plan.chunks):
                records[key] = size, mark
        return Listing(self, records, {stretch for stretch in stretches if stretch is not None})

    def read(self, keys: Sequence[CommitKey]) -> list[tuple[CommitRecord, bytes]]:
        """Each record and its bytes. Raises OutputConflict for one that is gone, damaged or of another job."""
        return list(map(self._parsed, keys, self.store.read_many([key.name for key in keys])))

    def _parsed(self, key: CommitKey, data: bytes | None) -> tuple[CommitRecord, bytes]:
        where = f"{self.store.url}/{key.name}"
        if data is None:
            raise OutputConflict(f"{where}: was listed and is gone; somebody removes files from this output")
        record = CommitRecord.from_bytes(data, where)
        if record.key != key or record.fingerprint != self.plan.digest:
            raise OutputConflict(f"{where}: belongs to another chunk or job; restore it from a copy, or remove it")
        return record, data

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Make a chunk done. Returns the record that holds from now on: another worker's, if it was first."""
        if self.store.put_if_absent(record.key.name, record.to_bytes()):
            return record
        return self.read([record.key])[0][0]


@dataclass(frozen=True)
class Listing:
    """The records that stood on storage at one moment: key → size and mark. `stretches`: those that have a summary."""

    ledger: Ledger
    records: dict[CommitKey, tuple[int, str | None]]
    stretches: set[Stretch]

    def in_effect(self, last_pass: int | None = None) -> dict[int, CommitKey]:
        """Chunk → its record of the highest pass, up to `last_pass`; ascending. Chunks without a record are open."""
        keys = (key for key in sorted(self.records) if last_pass is None or key.pass_number <= last_pass)
        return {key.chunk: key for key in keys}

    def of_pass(self, number: int) -> set[int]:
        """Return the chunks that this pass has committed."""
        return {key.chunk for key in self.records if key.pass_number == number}

    def read(self, keys: Iterable[CommitKey]) -> Iterator[CommitRecord]:
        """Each of these records, as they come: from summaries as far as these agree with the listing, else itself.

        Few are in memory at once. Raises OutputConflict, see Ledger.read.
        """
        return (record for record, _ in self._read(keys))

    def entries(self, keys: Iterable[CommitKey]) -> Iterator[tuple[CommitKey, Entry]]:
        """Yield the summary entries of these records.

        Records that the store does not mark, or that we did not write, are left out.
        """
        for record, line in self._read(keys):
            mark = self.records[record.key][1]
            if mark is not None and line == record.to_bytes():
                yield record.key, Entry(line, mark)

    def requests(self, keys: Iterable[CommitKey]) -> int:
        """Return the number of objects that `read` asks for if all summaries agree."""
        wanted = set(keys)
        chosen = cover(self.stretches, len(self.ledger.plan.chunks), wanted)
        covered = sum((chunk, stretch.pass_number) in wanted for stretch in chosen for chunk in stretch.chunks)
        return len(chosen) + len(wanted) - covered

    def _read(self, keys: Iterable[CommitKey]) -> Iterator[tuple[CommitRecord, bytes]]:
        wanted = set(keys)
        chosen = cover(self.stretches, len(self.ledger.plan.chunks), wanted)
        for name, data in ahead(self._summary, chosen, _SUMMARIES_AT_ONCE):
            for record, line in self._agreeing(name, data):
                if record.key in wanted:
                    wanted.remove(record.key)
                    yield record, line
        yield from many_ahead(self.ledger.read, sorted(wanted), _RECORDS_AT_ONCE, self.ledger.store.batch)

    def in_order(self, keys: list[CommitKey]) -> Iterator[CommitRecord]:
        """Read records in the order of `keys`, for callers that may stop early: few first, then more at once."""
        size = _RECORDS_AT_ONCE
        while keys:
            places = {key: place for place, key in enumerate(keys[:size])}
            yield from sorted(self.read(places), key=lambda record: places[record.key])
            keys, size = keys[size:], size * 4

    def _summary(self, stretch: Stretch) -> tuple[str, bytes | None]:
        name = stretch.name(self.ledger.plan)
        return name, self.ledger.store.read(name)

    def _agreeing(self, name: str, data: bytes | None) -> Iterator[tuple[CommitRecord, bytes]]:
        """Yield records whose entries agree with the listing; none of a summary that is gone, damaged or foreign."""
        digest = self.ledger.plan.digest
        try:
            for line, mark in decode(data, digest) if data is not None else []:
                record = CommitRecord.from_bytes(line, name)
                if self.records.get(record.key) == (len(line), mark) and record.fingerprint == digest:
                    yield record, line
        except (ValueError, OutputConflict) as error:
            url = self.ledger.store.url
            log.warning("summary ignored, see batchinfer verify", file=f"{url}/{name}", why=str(error))


@dataclass(frozen=True)
class JobOutput:
    """An output as its readers see it."""

    store: Store
    plan: JobPlan
    spec: JobSpec
    ledger: Ledger


def open_output(path: str, storage: StorageSpec) -> JobOutput:
    """Open a running or finished output. Raises InputMissing where no job has written."""
    store = Store.open(path, storage)
    plan = load_plan(store)
    data = store.read(JOB)
    if data is None:
        raise InputMissing(f"{store.url} holds no {JOB}; start the job again, which writes it")
    try:
        spec = parse_spec(orjson.loads(data), f"{store.url}/{JOB}")
    except (ValueError, SpecError) as error:
        raise OutputConflict(f"{store.url}/{JOB}: {error}") from None
    return JobOutput(store, plan, spec, Ledger(store, plan))


def save_spec(spec: JobSpec, store: Store) -> None:
    """Write job.json beside the output: what all runs of the job have in common.

    What each may set anew (the engine's capacity, when to give up) is in its report. Secrets that were put into
    storage.options stay out of it.
    """
    values = spec.model_dump(mode="json", exclude={"errors"})
    values["engine"] = {name: value for name, value in values["engine"].items() if name in ENGINE_DECIDES}
    secret = re.compile("key|secret|token|password|credential", re.IGNORECASE)
    del values["fake"]["step_s"]
    values["storage"]["options"] = {
        name: value for name, value in values["storage"]["options"].items() if not secret.search(name)
    }
    store.put_if_absent(JOB, json.dumps(values, indent=1).encode() + b"\n")
