"""Rates of the whole engine on random weights: host and device time of steps, and a workload beside its roofline.

The workload is nano-vllm's: 256 prompts of 100 to 1,024 random tokens, answers of 100 to 1,024, seed 0.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchinfer.bench.step_work import Formats, ModelWork, StepTokens
from batchinfer.engine.engine import Engine
from batchinfer.engine.plan import StepPlan, StepResult
from batchinfer.models.decoder import Decoder
from batchinfer.ops.streams import DeviceMemory, Download, Streams
from batchinfer.request import Constraint, Request, SamplingParams
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner, Ticket
from batchinfer.runner.kv_cache import bytes_per_token
from tests.gpu.rig import Rig, make_engine

_KV_SHARE = 0.6  # of the memory that the weights leave: graphs and activations need some


class Workload(NamedTuple):
    """Sizes of a measurement."""

    sequences: int = 256
    tokens: tuple[int, int] = (100, 1024)  # of prompts, and of answers
    step_tokens: int = 8192
    context: int = 2048
    measured_steps: int = 64


TINY = Workload(4, (5, 12), 32, 32, 4)


class StepSplit(NamedTuple):
    """Median milliseconds of a step with all seats decoding. waited: of them, on the device."""

    model: str
    depth: int
    sequences: int
    step_ms: float
    waited_ms: float

    @property
    def host_ms(self) -> float:
        return self.step_ms - self.waited_ms


class Throughput(NamedTuple):
    """A run of a workload beside the least time that the device's measured limits allow for its plans."""

    model: str
    seconds: float
    limit_s: float
    steps: int
    prompt_tokens: int
    answer_tokens: int
    preemptions: int

    @property
    def tokens_per_s(self) -> float:
        return self.answer_tokens / self.seconds


class WatchedStreams:
    """Streams that count the seconds that the host waits."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.waited_s = 0.0

    def pinned(self, num_bytes: int) -> Tensor:
        return self._streams.pinned(num_bytes)

    def upload(self, source: Tensor, target: Tensor) -> None:
        self._streams.upload(source, target)

    def download(self, source: Tensor) -> Download:
        return _WatchedDownload(self, self._streams.download(source))

    def synchronize(self) -> None:
        self._streams.synchronize()

    def memory(self) -> DeviceMemory:
        return self._streams.memory()

    def reset_peak(self) -> None:
        self._streams.reset_peak()


class _WatchedDownload:
    def __init__(self, streams: WatchedStreams, download: Download) -> None:
        self._streams = streams
        self._download = download

    def wait(self) -> Tensor:
        began = perf_counter()
        values = self._download.wait()
        self._streams.waited_s += perf_counter() - began
        return values


class RecordingRunner:
    """A runner with another depth that keeps what its plans compute."""

    def __init__(self, runner: DeviceRunner, depth: int) -> None:
        self.depth = depth
        self.steps: list[StepTokens] = []
        self._runner = runner

    def launch(self, plan: StepPlan, constraints: Mapping[int, Constraint]) -> Ticket:
        if plan.seats:
            self.steps.append(StepTokens.of_plan(plan))
        return self._runner.launch(plan, constraints)

    def collect(self, ticket: Ticket) -> StepResult:
        return self._runner.collect(ticket)

    def discard(self) -> None:
        self._runner.discard()


class EngineRates:
    """An engine's parts on one device, measured one after the other."""

    def __init__(self, rig: Rig, name: str, decoder: Decoder, workload: Workload) -> None:
        self._rig = rig
        self._name = name
        self._decoder = decoder
        self._workload = workload
        self._limits = StepLimits(
            workload.sequences, workload.step_tokens, workload.context, 16, decoder.config.vocab_size
        )
        self._streams = WatchedStreams(rig.make_streams())
        gc.collect()  # a model that was measured before
        self._streams.reset_peak()
        block_bytes = self._limits.block_size * bytes_per_token(decoder.config.kv_shape, decoder.dtype)
        room = int(_KV_SHARE * self._streams.memory().free) // block_bytes
        self._num_blocks = min(workload.sequences * self._limits.table_blocks, room)
        began = perf_counter()
        self._runner = rig.make_runner(decoder, self._limits, self._num_blocks, streams=self._streams)
        self._streams.synchronize()
        self.capture_s = perf_counter() - began

    def step_split(self, depth: int) -> StepSplit:
        """Time steps in which all seats decode."""
        recording = RecordingRunner(self._runner, depth)
        engine = make_engine(recording, self._limits, self._num_blocks)
        workload = self._workload
        prompt = workload.context // 3
        answer = min(workload.measured_steps + 64, workload.context - prompt)
        for request in _requests(workload.sequences, (prompt, prompt), (answer, answer), self._limits.vocab_size):
            engine.add(request)
        while sum(len(step.decode_lengths) for step in recording.steps[-2:]) < 2 * workload.sequences:
            assert engine.has_work, "some answers ended before all prompts were computed"
            engine.step()
        steps_s, waited_s = [], []
        for _ in range(workload.measured_steps):
            before, began = self._streams.waited_s, perf_counter()
            engine.step()
            steps_s.append(perf_counter() - began)
            waited_s.append(self._streams.waited_s - before)
        _run(engine)
        milliseconds = 1e3 * median(steps_s), 1e3 * median(waited_s)
        return StepSplit(self._name, depth, workload.sequences, *milliseconds)

    def throughput(self, bytes_per_s: float, operations_per_s: float) -> Throughput:
        """Run the workload; the limits are those of the device."""
        recording = RecordingRunner(self._runner, DeviceRunner.depth)
        engine = make_engine(recording, self._limits, self._num_blocks)
        span = self._workload.tokens
        requests = _requests(self._workload.sequences, span, span, self._limits.vocab_size)
        for request in requests:
            engine.add(request)
        began = perf_counter()
        answers = _run(engine)
        seconds = perf_counter() - began
        assert answers == sum(request.max_tokens for request in requests), "an answer ended early"
        return Throughput(
            self._name,
            seconds,
            self._limit_s(recording.steps, bytes_per_s, operations_per_s),
            len(recording.steps),
            sum(len(request.prompt) for request in requests),
            answers,
            engine.stats.preemptions,
        )

    def _limit_s(self, steps: list[StepTokens], bytes_per_s: float, operations_per_s: float) -> float:
        size, name = self._decoder.dtype.itemsize, str(self._decoder.dtype)
        work = ModelWork(self._decoder.config, Formats(size, size, size, name, name))
        return sum(
            max((op.memory_bytes + op.passed_bytes) / bytes_per_s, op.operations / operations_per_s)
            for step in steps
            for op in work.works(step).values()
        )


def _requests(count: int, prompts: tuple[int, int], answers: tuple[int, int], vocabulary: int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            number,
            rng.choices(range(min(10_000, vocabulary)), k=rng.randint(*prompts)),
            SamplingParams(temperature=0.6),
            rng.randint(*answers),
            key=number,
        )
        for number in range(count)
    ]


def _run(engine: Engine) -> int:
    """Step until nothing is left; return the number of tokens in the answers."""
    tokens = 0
    while engine.has_work:
        for answer in engine.step().finished:
            assert answer.error is None, answer.error
            tokens += len(answer.token_ids)
    return tokens


def measured_model(
    rig: Rig, name: str, values: Mapping[str, Any], dtype: torch.dtype, workload: Workload
) -> EngineRates:
    """Return an engine over random weights, ready to be measured."""
    from tests.gpu.random_model import random_decoder

    return EngineRates(rig, name, random_decoder(values, rig.backend, dtype, rig.device.type), workload)
