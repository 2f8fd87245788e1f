"""Latency of requests: time to first token and time per output token, with a fixed number of running requests.

A finished request is replaced at once, so that `batch` requests are always in the engine until all have been started.
Times are taken after the step that sampled a token; tokenizing and preparing prompts are excluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from batchinfer.bench.cost import LinearCost, MachineRates, StepWork, limit_of
from batchinfer.bench.machine import Machine
from batchinfer.bench.measured import MeasuredLLM, Subject
from batchinfer.bench.table import number, table
from batchinfer.bench.timing import percentile
from batchinfer.bench.workload import Synthetic
from batchinfer.errors import EngineError, UsageError
from batchinfer.llm import Prompt
from batchinfer.request import Request

_WARM_REQUESTS = 2


@dataclass(frozen=True)
class Spread:
    """Distribution of `count` values, in seconds."""

    count: int
    min: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(len(values), min(values), *(percentile(values, share) for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class Latency:
    """Latency at one batch size, from which times after the first token are missing without a second token.

    It holds the time to first token and the mean time per later token of each request, and single gaps between tokens.
    The limits are those of `cost`: of a step with the shortest prompt alone, and of a step with one token of each
    request. The fake model has none.
    """

    batch: int
    requests: int
    seconds: float
    first_token_s: Spread
    per_token_s: Spread | None
    gap_s: Spread | None
    first_token_limit_s: float | None
    per_token_limit_s: float | None


@dataclass(frozen=True)
class Plan:
    """`repeat` requests run in each of the `batch` slots, one after the other; `shape` defines their lengths."""

    shape: Synthetic
    batches: list[int]
    repeat: int


def parse_batches(text: str) -> list[int]:
    """Parse `"1,8,32"`. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text}: must be numbers from 1, separated by commas, for example 1,8,32")
    return [int(part) for part in parts]


def check(llm: MeasuredLLM, plan: Plan) -> None:
    """Check that the batches can run. Raises UsageError."""
    most = max(plan.batches)
    if most > llm.max_num_seqs:
        raise UsageError(
            f"--batch {most}: more than engine.max_num_seqs, {llm.max_num_seqs}; add --set engine.max_num_seqs={most}"
        )
    longest = plan.shape.input_tokens.high + plan.shape.output_tokens.high
    if most * longest > llm.kv_cache_tokens:
        raise UsageError(
            f"--batch {most}: {most} requests of up to {longest} tokens do not fit the KV cache of "
            f"{llm.kv_cache_tokens} tokens; raise engine.kv_cache_tokens or ask for less"
        )


def measure(subject: Subject, plan: Plan, batch: int, machine: Machine) -> Latency:
    """Measure one batch size. Raises EngineError if the model fails."""
    llm = subject.llm
    made = replace(plan.shape, requests=batch * plan.repeat + _WARM_REQUESTS).prompts(llm)
    _closed_loop(llm, made[:_WARM_REQUESTS], 1)
    llm.restart()
    start = perf_counter()
    tracks = _closed_loop(llm, made[_WARM_REQUESTS:], batch)
    seconds = perf_counter() - start
    later = [track for track in tracks if len(track.times) > 1]
    gaps = [after - before for track in later for before, after in zip(track.times, track.times[1:], strict=False)]
    means = [(track.times[-1] - track.times[0]) / (len(track.times) - 1) for track in later]
    return Latency(
        batch=batch,
        requests=len(tracks),
        seconds=seconds,
        first_token_s=Spread.of([track.times[0] - track.added for track in tracks]),
        per_token_s=Spread.of(means) if means else None,
        gap_s=Spread.of(gaps) if gaps else None,
        first_token_limit_s=_limit(subject.cost, machine, plan.shape.input_tokens.low, 1),
        per_token_limit_s=_limit(subject.cost, machine, batch, batch),
    )


def _limit(cost: LinearCost | None, machine: Machine, tokens: int, sampled: int) -> float | None:
    if cost is None:
        return None
    step = StepWork(tokens, sampled, sampled, 0.0)
    return limit_of(cost, [step], MachineRates.of(machine, cost)).seconds


class _Track:
    """Time at which a request was added, and times of its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.added = perf_counter()


def _closed_loop(llm: MeasuredLLM, prompts: list[Prompt], batch: int) -> list[_Track]:
    engine = llm.engine
    tracks: dict[int, _Track] = {}  # by request id, in the order of the prompts
    running = 0
    while running or len(tracks) < len(prompts):
        while running < batch and len(tracks) < len(prompts):
            request = _request(prompts[len(tracks)])
            tracks[request.request_id] = _Track()
            engine.add(request, subscribe=True)
            running += 1
        output = engine.step()
        now = perf_counter()
        for request_id, news in output.new_tokens.items():
            tracks[request_id].times.extend([now] * len(news.token_ids))
        running -= len(output.finished)
        failed = next((answer for answer in output.finished if answer.error is not None), None)
        if failed is not None:
            raise EngineError(f"a request of the benchmark failed: {failed.error}")
    return list(tracks.values())


def _request(prompt: Prompt) -> Request:
    [content] = prompt.contents
    assert isinstance(content, list) and prompt.params is not None and prompt.params.max_tokens is not None
    ids = [token for token in content if isinstance(token, int)]
    return Request(prompt.index, ids, prompt.params, prompt.params.max_tokens)


def as_json(found: Latency) -> dict[str, Any]:
    return asdict(found)


def describe(found: Sequence[Latency]) -> str:
    header = ("batch", "what", "values", "min ms", "median", "p90", "p99", "limit")
    rows = []
    for latency in found:
        spreads = (
            ("first token", latency.first_token_s, latency.first_token_limit_s),
            ("per token", latency.per_token_s, latency.per_token_limit_s),
            ("gap", latency.gap_s, latency.per_token_limit_s),
        )
        for name, spread, limit in spreads:
            if spread is not None:
                times = [spread.min, spread.median, spread.p90, spread.p99, *([] if limit is None else [limit])]
                cells = [number(1e3 * seconds) for seconds in times]
                rows.append((f"{latency.batch}", name, f"{spread.count:,}", *cells, *([""] if limit is None else [])))
    return table(header, rows, left=2)
