"""What is done: commit records on storage, the only thing that readers, resume and `verify` trust.

A chunk is done when its commit record exists. A record is put-if-absent, names a part that was uploaded whole before,
and never changes; a retry pass p adds `<chunk>.r<p>.json`, and the highest pass of a chunk is in effect.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from batchinfer.errors import InputMissing, OutputConflict, SpecError
from batchinfer.io.storage import Store
from batchinfer.job.fingerprint import ENGINE_DECIDES
from batchinfer.job.plan import JobPlan, load_plan
from batchinfer.spec import JobSpec, StorageSpec, parse_spec

COMMITS = "commits/"
PARTS = "parts/"
JOB = "job.json"
_COMMIT_NAME = re.compile(r"commits/(\d{6,})(?:\.r([1-9]\d*))?\.json")
_PART_NAME = re.compile(r"parts/part-(\d{6,})-([0-9a-f]+)-[0-9a-f]{16}\.(?:parquet|jsonl(?:\.gz|\.zst)?)", re.ASCII)
_READERS = 16  # commit records are small: latency, not bandwidth


class CommitKey(NamedTuple):
    chunk: int
    pass_number: int  # 0: the run itself; p ≥ 1: the p-th retry pass

    @property
    def name(self) -> str:
        retry = f".r{self.pass_number}" if self.pass_number else ""
        return f"{COMMITS}{self.chunk:06d}{retry}.json"


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """One chunk's result. Deterministic: no times, no worker. `part` is None where no row was selected."""

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
            whole = (record.chunk, record.pass_number, record.size_bytes, record.rows, record.output_rows, record.ok)
            if not all(type(number) is int for number in (*whole, *record.errors.values())):
                raise ValueError("a count is not a whole number")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputConflict(f"{where}: not a commit record ({error}); restore it from a copy") from None
        return record


def part_name(plan: JobPlan, chunk: int, sha256: str, suffix: str) -> str:
    return f"{PARTS}part-{chunk:06d}-{plan.mark}-{sha256[:16]}{suffix}"


def is_part(name: str, plan: JobPlan) -> bool:
    """Whether a job of this plan may have written the object: `part_name` gives such names, and nobody else does."""
    match = _PART_NAME.fullmatch(name)
    return match is not None and match[2] == plan.mark and f"{int(match[1]):06d}" == match[1]


def is_commit(name: str) -> bool:
    """Whether a record may have this name; its content says whose it is."""
    return _COMMIT_NAME.fullmatch(name) is not None


class Ledger:
    """Reads and writes the commit records of one plan."""

    def __init__(self, store: Store, plan: JobPlan) -> None:
        self.store = store
        self.plan = plan

    def listed(self) -> list[CommitKey]:
        """All records that exist, by chunk and pass. One listing."""
        keys = []
        for name in self.store.find(COMMITS):
            match = _COMMIT_NAME.fullmatch(name)
            if match and int(match[1]) < len(self.plan.chunks):
                keys.append(CommitKey(int(match[1]), int(match[2] or 0)))
        return sorted(keys)

    def in_effect(self) -> dict[int, CommitKey]:
        """Chunk → its record of the highest pass; chunks without a record are open."""
        return {key.chunk: key for key in self.listed()}  # sorted: the last one wins

    def read(self, key: CommitKey) -> CommitRecord:
        """Raises OutputConflict for a record that is gone, damaged or of another job."""
        where = f"{self.store.url}/{key.name}"
        data = self.store.read(key.name)
        if data is None:
            raise OutputConflict(f"{where}: was listed and is gone; somebody removes files from this output")
        record = CommitRecord.from_bytes(data, where)
        if record.key != key or record.fingerprint != self.plan.digest:
            raise OutputConflict(f"{where}: belongs to another chunk or job; restore it from a copy, or remove it")
        return record

    def read_all(self, keys: Iterable[CommitKey]) -> list[CommitRecord]:
        """Records in the order of `keys`, read concurrently."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger") as pool:
            return list(pool.map(self.read, keys))

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Make a chunk done. Returns the record that holds from now on: another worker's, if it was first."""
        if self.store.put_if_absent(record.key.name, record.to_bytes()):
            return record
        return self.read(record.key)


@dataclass(frozen=True)
class Output:
    """An output as its readers see it."""

    store: Store
    plan: JobPlan
    spec: JobSpec
    ledger: Ledger


def open_output(path: str, storage: StorageSpec) -> Output:
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
    return Output(store, plan, spec, Ledger(store, plan))


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
