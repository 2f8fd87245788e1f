"""Host work beside a device that computes meanwhile: how long the device waits for its next step.

The engine runs with the runner of devices over a pretend device, whose clock is busy for a given time from each launch
of a forward pass on. Its kernels compute nothing; `FakeRunner` decides the tokens, and its time is excluded. Launches
of kernels, about ten in a step that replays a graph, and real copies take additional time on a GPU. A *gap* is the time
from a step's end on the device to the next launch. With depth 0 all host work lies in it; with depth 1 a step is
launched while the one before runs, and the rest of the host's work overlaps.

In the second kind of load a tenth of the requests has penalties: the host edits their logits, so their sampling waits
for the tokens before. Sequences arrive and finish at random times, as in `host`. One core.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.steps import LogprobRows, PackedStep, SampledRows, SampleRows, SeatState, SeatUpdates
from torch import Tensor

from batchinfer.bench.host_load import (
    ANSWER,
    BLOCK_SIZE,
    CONTEXT,
    VOCAB,
    make_request,
    make_scheduler,
    queued_requests,
    smallest_config,
)
from batchinfer.bench.table import number, table
from batchinfer.bench.timing import percentile
from batchinfer.engine.engine import Engine
from batchinfer.engine.fake import FakeRunner
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.engine.scheduler import Scheduler
from batchinfer.models.decoder import Decoder
from batchinfer.ops.graphs import GraphBody
from batchinfer.ops.pretend import PretendStreams, pretend_backend
from batchinfer.request import Constraint, Request, SamplingParams
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner

_STEP_S = 12e-6  # of the device, per sequence: Qwen3-0.6B with contexts of 450 tokens on an H200
_LEAST_STEP_S = 1e-3
_STEPS = 60
_WARM_STEPS = 2 * ANSWER.longest
_EDITED_SHARE = 10  # one request in so many
_PLAIN, _EDITED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, frequency_penalty=0.5)


@dataclass(frozen=True)
class DeviceHostCost:
    """Milliseconds per step. `host_ms`: all work of the host, without waiting. Gaps: see the module.

    `edited`: a tenth of the requests has logits that the host edits.
    """

    sequences: int
    edited: bool
    depth: int
    steps: int
    device_ms: float
    gap_ms: float
    gap_p90_ms: float
    host_ms: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(numbers: Sequence[int]) -> list[DeviceHostCost]:
    """Measure each number of sequences, plain and with edited rows, with depth 0 and 1."""
    loads = [(count, edited, depth) for count in numbers for edited in (False, True) for depth in (0, 1)]
    return [_measure(*load) for load in loads]


def _measure(sequences: int, edited: bool, depth: int) -> DeviceHostCost:
    streams, device_s = _ClockedStreams(), max(_LEAST_STEP_S, sequences * _STEP_S)
    scheduler = make_scheduler(sequences)
    runner = _FakeAnswers(sequences, streams, depth, scheduler)
    engine = Engine(scheduler, runner)
    load = _Requests(engine, sequences, edited)
    for _ in range(_WARM_STEPS):
        load.step()
    streams.start(device_s)
    load.prepare(_STEPS)
    runner.fake_s = 0.0
    start = perf_counter()
    for _ in range(_STEPS):
        load.step()
    host_s = perf_counter() - start - streams.waited_s - runner.fake_s
    gaps = [1e3 * gap for gap in streams.gaps_s]
    return DeviceHostCost(
        sequences=sequences,
        edited=edited,
        depth=depth,
        steps=_STEPS,
        device_ms=1e3 * device_s,
        gap_ms=fmean(gaps),
        gap_p90_ms=percentile(gaps, 0.9),
        host_ms=1e3 * host_s / _STEPS,
    )


class _Requests:
    """Requests that keep all seats of an engine taken; they are made before a step is timed."""

    def __init__(self, engine: Engine, sequences: int, edited: bool) -> None:
        self._engine = engine
        self._waiting = queued_requests(sequences)
        self._rng = random.Random(sequences)
        self._edited = edited
        self._made = 0
        self._ready: deque[Request] = deque()

    def prepare(self, steps: int) -> None:
        """Make as many requests as this many steps can end at most, and as wait then."""
        for _ in range(self._waiting + 4 * steps * self._waiting // ANSWER.shortest):
            self._ready.append(self._make())

    def step(self) -> None:
        engine = self._engine
        for _ in range(self._waiting - len(engine.scheduler.waiting)):
            engine.add(self._ready.popleft() if self._ready else self._make())
        finished = engine.step().finished
        assert all(answer.error is None for answer in finished)

    def _make(self) -> Request:
        self._made += 1
        params = _EDITED if self._edited and self._made % _EDITED_SHARE == 0 else _PLAIN
        return make_request(self._made, self._rng, params)


class _FakeAnswers:
    """The runner of devices, with the tokens of a `FakeRunner` in its results."""

    def __init__(self, sequences: int, streams: _ClockedStreams, depth: int, scheduler: Scheduler) -> None:
        self.depth = depth
        self.fake_s = 0.0
        limits = StepLimits(sequences, scheduler.max_step_tokens, CONTEXT, BLOCK_SIZE, VOCAB)
        decoder = _OccupyingDecoder(streams, limits.most_tokens)
        self._runner = DeviceRunner(decoder, streams, _LaunchedGraphs(), limits, len(scheduler.pool.blocks))
        self._runner.capture_graphs()
        self._fake = FakeRunner(ANSWER)

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> tuple[object, StepResult]:
        ticket = self._runner.launch(plan, constraints)
        start = perf_counter()
        result = self._fake.launch(plan)
        self.fake_s += perf_counter() - start
        return ticket, result

    def collect(self, ticket: tuple[Any, StepResult]) -> StepResult:
        result = self._runner.collect(ticket[0])
        assert not result.failed
        return ticket[1]

    def discard(self) -> None:
        self._runner.discard()


class _ClockedStreams(PretendStreams):
    """Streams that spin until the device's clock is there, and count that time; copies are not checked."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0
        self._step_s = 0.0

    def start(self, step_s: float) -> None:
        """Count from now on, with steps of this length."""
        self.gaps_s.clear()
        self.waited_s = 0.0
        self._step_s = step_s

    def launch_step(self) -> None:
        if self._step_s:
            self.occupy(self._step_s)

    def upload(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def finish(self, uploads: int, until: float) -> None:
        start = perf_counter()
        while perf_counter() < until:  # sleeping would oversleep
            pass
        self.waited_s += perf_counter() - start


class _OccupyingDecoder(Decoder):
    """Decoder that computes nothing: a forward pass keeps the device busy for a step."""

    def __init__(self, streams: _ClockedStreams, most_tokens: int) -> None:
        backend = pretend_backend()
        backend.steps = _NoKernels()  # type: ignore[assignment]  # any StepKernels will do
        super().__init__(backend, smallest_config())
        self._streams = streams
        self._hidden_TE = torch.zeros(most_tokens, self.config.hidden_size)
        self._logits_NV = torch.zeros(most_tokens, VOCAB)

    def forward(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        self._streams.launch_step()
        return self._hidden_TE[: len(inputs.tokens_T)]

    def logits(self, hidden_NE: Tensor) -> Tensor:
        return self._logits_NV[: len(hidden_NE)]


class _NoKernels:
    """Kernels of steps that are launched and do nothing: all tokens are 0."""

    def update_seats(self, updates: SeatUpdates, state: SeatState) -> None:
        """Do nothing."""

    def expand_step(self, step: PackedStep, state: SeatState, block_size: int, out: StepInputs) -> None:
        """Do nothing."""

    def sample_rows(self, logits_NV: Tensor, rows: SampleRows, state: SeatState, out: SampledRows) -> None:
        """Do nothing: the results are zero, and sound."""

    def gather_logprobs(
        self, logits_NV: Tensor, tokens_N: Tensor, best: int, named_NC: Tensor | None = None
    ) -> LogprobRows:
        raise AssertionError("no request asks for logprobs")


class _LaunchedGraphs:
    """Graphs that run their bodies when they are replayed."""

    def __init__(self) -> None:
        self._bodies: dict[object, GraphBody] = {}

    def capture(self, key: object, body: GraphBody) -> None:
        self._bodies[key] = body

    def replay(self, key: object) -> None:
        self._bodies[key].run()

    def __contains__(self, key: object) -> bool:
        return key in self._bodies


def describe(found: Sequence[DeviceHostCost]) -> str:
    header = ("sequences", "edited rows", "depth", "device, ms", "gap, ms", "gap p90", "host, ms")
    rows = [
        (
            f"{cost.sequences:,}",
            "10%" if cost.edited else "none",
            f"{cost.depth}",
            *map(number, (cost.device_ms, cost.gap_ms, cost.gap_p90_ms, cost.host_ms)),
        )
        for cost in found
    ]
    return table(header, rows, left=0)
