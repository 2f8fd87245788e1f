"""Status of a job from its output alone: commit records, salvage, manifest. No worker is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchinfer.job.finalize import is_finished
from batchinfer.job.ledger import JobOutput
from batchinfer.job.salvage import SALVAGE, is_journal
from batchinfer.job.shard import Shard

_SUMMED = ("rows", "ok", "prompt_tokens", "completion_tokens", "scored_tokens")


@dataclass(frozen=True)
class ShardShare:
    """Chunks of one worker of an array job: done, and in all."""

    shard: Shard
    done: int
    chunks: int


@dataclass(frozen=True)
class Status:
    """Counts of what is committed. `rows` are selected input rows of committed chunks, `covered` those of the plan."""

    url: str
    finished: bool
    chunks_done: int
    chunks: int
    rows: int
    covered: int
    ok: int
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    scored_tokens: int
    retry_passes: int
    salvage: dict[str, int]  # name → bytes
    shards: list[ShardShare] = field(default_factory=list)


def read_status(output: JobOutput, shards: int = 1) -> Status:
    """`shards` above 1 adds the share of each of that many workers."""
    plan = output.plan
    finished = is_finished(output.store)
    listing = output.ledger.listing()
    keys = listing.in_effect()
    sums: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for record in listing.read(keys.values()):
        sums.update({name: getattr(record, name) for name in _SUMMED})
        errors.update(record.errors)
    workers = [Shard(index, shards) for index in range(shards)] if shards > 1 else []
    return Status(
        url=output.store.url,
        finished=finished,
        chunks_done=len(keys),
        chunks=len(plan.chunks),
        covered=plan.rows,
        **{name: sums[name] for name in _SUMMED},
        errors=dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))),
        retry_passes=max((key.pass_number for key in keys.values()), default=0),
        salvage={name: size for name, size in output.store.find(SALVAGE).items() if is_journal(name, plan)},
        shards=[_share(worker, len(plan.chunks), keys.keys()) for worker in workers],
    )


def _share(worker: Shard, chunks: int, done: Iterable[int]) -> ShardShare:
    own = range(worker.index, chunks, worker.count)
    return ShardShare(worker, sum(map(worker.owns, done)), len(own))


def describe_status(status: Status) -> str:
    """Return the status as lines for a person."""
    share = f"{100 * status.chunks_done / status.chunks:.1f} %" if status.chunks else "nothing to do"
    scored = f", {status.scored_tokens:,} scored" if status.scored_tokens else ""
    lines = [
        ("output", status.url),
        ("state", "finished" if status.finished else "not finished; run the same command again to continue"),
        ("chunks", f"{status.chunks_done:,} of {status.chunks:,} committed ({share})"),
        ("rows", f"{status.rows:,} written, of {status.covered:,} that the job covers before input.where"),
        ("tokens", f"{status.prompt_tokens:,} in, {status.completion_tokens:,} out{scored}"),
        ("errors", _errors(status)),
    ]
    if status.retry_passes:
        lines.append(("retries", f"{status.retry_passes} pass{'es' if status.retry_passes > 1 else ''}"))
    if status.salvage and not status.finished:
        size = sum(status.salvage.values())
        lines.append(("salvage", f"{len(status.salvage)} journals, {size:,} bytes of rows in open chunks"))
    for share_ in status.shards:
        shard = share_.shard
        lines.append((f"shard {shard.index}/{shard.count}", f"{share_.done:,} of {share_.chunks:,} chunks committed"))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _errors(status: Status) -> str:
    if not status.errors:
        return "none"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in status.errors.items())
    return f"{sum(status.errors.values()):,} rows ({kinds})"
