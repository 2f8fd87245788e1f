"""Host cost of a step: scheduling, building inputs, sampling bookkeeping, appending tokens.

Two runners execute each plan. `FakeRunner` decides the tokens, and its time is excluded. `ModelRunner` runs with a
decoder that computes nothing: the rest is the host work of a real step. Sequences arrive and finish at random times,
with outputs of 32 to 128 tokens, so that a step has the usual share of arrivals and ends. One core. The same is
measured with a stop string in each request, in turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from time import perf_counter
from typing import Any

import torch
from batchinfer_kernels.contract import StepInputs
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
from batchinfer.bench.timing import TURNS, percentile, take_turns
from batchinfer.engine.fake import FakeRunner
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.errors import UsageError
from batchinfer.models.decoder import Decoder
from batchinfer.ops.choose import available_backends
from batchinfer.request import Request, SamplingParams
from batchinfer.runner.model_runner import ModelRunner
from batchinfer.text.detokenize import StopStrings
from batchinfer.text.tokenizer import ByteTokenizer

_MOST_SEQUENCES = 65536
_LEAST_STEPS = 30
_BUDGET_S = 2.0  # of measured steps, for one number of sequences
_STOP = "\x03stop"  # it begins with a token that comes by, and the next letter never does


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step. queue: adding requests and handing over finished ones."""

    queue: float
    schedule: float
    build: float
    sample: float
    update: float

    @property
    def total(self) -> float:
        return self.queue + self.schedule + self.build + self.sample + self.update


@dataclass(frozen=True)
class HostCost:
    """Medians, in milliseconds per step.

    `total_with_stop_ms`: the total with a stop string in each request, which adds `stop_checks_ms` to the update.
    `growth`: relative growth of the time over that of the number of sequences since the row before; 1 is linear.
    """

    sequences: int
    steps: int
    queue_ms: float
    schedule_ms: float
    build_ms: float
    sample_ms: float
    update_ms: float
    total_ms: float
    total_p90_ms: float
    total_with_stop_ms: float
    stop_checks_ms: float
    us_per_sequence: float
    growth: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_sequences(text: str) -> list[int]:
    """Parse `"64,256"`, ascending. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if (
        len(numbers) != len(parts)
        or numbers != sorted(set(numbers))
        or not 0 < numbers[0] <= numbers[-1] <= _MOST_SEQUENCES
    ):
        raise UsageError(
            f"--sequences {text}: must be rising numbers from 1 to {_MOST_SEQUENCES}, separated by commas, for example "
            "64,256,1024"
        )
    return numbers


def measure(numbers: Sequence[int]) -> list[HostCost]:
    """Measure one cost per number of sequences, in turns, so that growth is not a change of the machine's speed."""
    works = {str(sequences): _steps(sequences) for sequences in numbers}
    taken = take_turns(works, _BUDGET_S * len(numbers), least=_LEAST_STEPS // TURNS)
    found: list[HostCost] = []
    for sequences in numbers:
        found.append(_cost(sequences, taken[str(sequences)], found[-1] if found else None))
    return found


def _steps(sequences: int) -> Callable[[], tuple[StepSeconds, StepSeconds]]:
    """Return a function that runs one step without and one with stop strings, in warmed-up engines."""
    plain, checked = _Load(sequences, False), _Load(sequences, True)
    for _ in range(2 * ANSWER.longest):
        plain.step()
        checked.step()
    return lambda: (plain.step(), checked.step())


def _cost(sequences: int, taken: Sequence[tuple[StepSeconds, StepSeconds]], before: HostCost | None) -> HostCost:
    """Summarize steps. `before` is the cost at fewer sequences, from which growth is computed."""
    steps, with_stop = zip(*taken, strict=True)
    median = {
        part.name: 1e3 * percentile([getattr(step, part.name) for step in steps], 0.5) for part in fields(StepSeconds)
    }
    totals = [1e3 * step.total for step in steps]
    total = percentile(totals, 0.5)
    return HostCost(
        sequences=sequences,
        steps=len(steps),
        queue_ms=median["queue"],
        schedule_ms=median["schedule"],
        build_ms=median["build"],
        sample_ms=median["sample"],
        update_ms=median["update"],
        total_ms=total,
        total_p90_ms=percentile(totals, 0.9),
        total_with_stop_ms=1e3 * percentile([step.total for step in with_stop], 0.5),
        stop_checks_ms=1e3 * percentile([step.update for step in with_stop], 0.5) - median["update"],
        us_per_sequence=1e3 * total / sequences,
        growth=None if before is None else total / before.total_ms * before.sequences / sequences,
    )


class _Load:
    """An engine with all seats taken, refilled for as long as it is stepped."""

    def __init__(self, sequences: int, stop_strings: bool) -> None:
        self._scheduler = make_scheduler(sequences)
        self._runner = _HostRunner(sequences, len(self._scheduler.pool.blocks))
        self._waiting = queued_requests(sequences)
        self._rng = random.Random(sequences)
        self._stop = StopStrings(ByteTokenizer(), (_STOP,), False, True) if stop_strings else None
        self._made = 0

    def step(self) -> StepSeconds:
        scheduler, runner = self._scheduler, self._runner
        fresh = [self._request() for _ in range(self._waiting - len(scheduler.waiting))]
        start = perf_counter()
        for request in fresh:
            scheduler.add(request)
        added = perf_counter()
        plan = scheduler.schedule()
        planned = perf_counter()
        result = runner.answer(plan)
        answered = perf_counter()
        scheduler.update(result)
        updated = perf_counter()
        finished = scheduler.take_finished()
        end = perf_counter()
        assert all(answer.error is None for answer in finished)
        return StepSeconds(
            added - start + end - updated, planned - added, runner.build_s, runner.sample_s, updated - answered
        )

    def _request(self) -> Request:
        self._made += 1
        check = self._stop.checker() if self._stop is not None else None
        return make_request(self._made, self._rng, SamplingParams(temperature=0.0), check)


class _HostRunner:
    """Runner that times the host work of the last plan.

    `build_s`: until the decoder is called. `sample_s`: from its logits to tokens.
    """

    def __init__(self, sequences: int, blocks: int) -> None:
        self._decoder = _NoArithmetic(sequences)
        self._runner = ModelRunner(self._decoder, blocks, BLOCK_SIZE, sequences, CONTEXT)
        self._fake = FakeRunner(ANSWER)
        self.build_s = self.sample_s = 0.0

    def answer(self, plan: StepPlan) -> StepResult:
        start = perf_counter()
        self._runner.collect(self._runner.launch(plan))
        end = perf_counter()
        self.build_s = self._decoder.called - start
        self.sample_s = end - self._decoder.answered
        return self._fake.collect(self._fake.launch(plan))


class _NoArithmetic(Decoder):
    """Decoder that indexes a step's inputs like a real one and returns prepared logits; it records the times."""

    def __init__(self, sequences: int) -> None:
        super().__init__(available_backends()[0], smallest_config())
        self._logits_NV = torch.zeros(sequences, VOCAB)
        self.called = self.answered = 0.0

    def forward(self, inputs: StepInputs, caches: Sequence[Tensor]) -> Tensor:
        self.prepare(inputs, caches)
        self.called = perf_counter()
        assert inputs.output_rows_N is not None, "a runner on the host names the rows"
        return self._logits_NV[: len(inputs.output_rows_N)]

    def largest_logits(self, hidden_NE: Tensor) -> None:
        """Return None: `logits` is called."""

    def logits(self, hidden_NE: Tensor) -> Tensor:
        self.answered = perf_counter()
        return hidden_NE


def describe(found: Sequence[HostCost]) -> str:
    header = (
        *("sequences", "queue", "schedule", "build", "sample", "update", "ms/step", "p90"),
        *("with stop", "us/sequence", "growth"),
    )
    rows = [
        (
            f"{cost.sequences:,}",
            *map(number, (cost.queue_ms, cost.schedule_ms, cost.build_ms, cost.sample_ms, cost.update_ms)),
            *map(number, (cost.total_ms, cost.total_p90_ms, cost.total_with_stop_ms, cost.us_per_sequence)),
            "" if cost.growth is None else f"{cost.growth:.2f}",
        )
        for cost in found
    ]
    return table(header, rows, left=0)
