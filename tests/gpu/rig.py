"""Devices that the checks and the benchmark run on: a GPU, Triton's interpreter, and the pretend device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from batchinfer_kernels.triton import make_backend

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import Scheduler
from batchinfer.models.decoder import Decoder
from batchinfer.ops.backend import Backend
from batchinfer.ops.graphs import CudaGraphs, Graphs, NoGraphs
from batchinfer.ops.pretend import PretendStreams, ReplayedGraphs, pretend_backend
from batchinfer.ops.streams import CudaStreams, Streams
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner

_REPEATS = 5


class Rig(NamedTuple):
    """A device with its backend, and what a runner on it is made of."""

    name: str
    backend: Backend
    make_streams: Callable[[], Streams]
    make_graphs: Callable[[], Graphs]

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def make_runner(
        self,
        decoder: Decoder,
        limits: StepLimits,
        num_blocks: int,
        graphs: Graphs | None = None,
        streams: Streams | None = None,
    ) -> DeviceRunner:
        """Return a runner with all its graphs captured."""
        graphs = self.make_graphs() if graphs is None else graphs
        runner = DeviceRunner(decoder, streams or self.make_streams(), graphs, limits, num_blocks)
        if not isinstance(graphs, NoGraphs):
            runner.capture_graphs()
        return runner

    def seconds_of(self, call: Callable[[int], object], budget_s: float = 0.15) -> float:
        """Return the median time of call(0), call(1) and so on, on the device's clock, after a warm-up.

        `call` gets the number of the call, so that calls can take turns over more data than a cache holds.
        """
        call(0)
        if not self.is_gpu:
            return self._seconds(call, 1)
        count = max(1, min(200, int(budget_s / _REPEATS / self._seconds(call, 3))))
        return median(self._seconds(call, count) for _ in range(_REPEATS))

    def _seconds(self, call: Callable[[int], object], count: int) -> float:
        if not self.is_gpu:
            began = perf_counter()
            for number in range(count):
                call(number)
            return (perf_counter() - began) / count
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for number in range(count):
            call(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


def make_rig(name: str) -> Rig:
    """Return a rig: `cuda`, `interpreted` (Triton on the CPU) or `pretend` (torch ops on the CPU)."""
    if name == "cuda":
        backend = make_backend("cuda", lambda fallback: None)
        device = torch.device("cuda", torch.cuda.current_device())
        return Rig(name, backend, lambda: CudaStreams(device), lambda: CudaGraphs(device))
    if name == "interpreted":
        from tests.kernels.conftest import make_interpreted_backend  # imports triton

        return Rig(name, make_interpreted_backend(), PretendStreams, ReplayedGraphs)
    return Rig(name, pretend_backend(), PretendStreams, ReplayedGraphs)


def make_engine(runner: DeviceRunner, limits: StepLimits, num_blocks: int, drafts: int = 0) -> Engine:
    pool = BlockPool(num_blocks, limits.block_size)
    scheduler = Scheduler(pool, limits.max_num_seqs, limits.max_step_tokens, drafts, max_draft_rows=32)
    return Engine(scheduler, runner)


def in_turn(makers: Sequence[Callable[[], object]]) -> Callable[[int], object]:
    """Return a call whose n-th time is that of the n-th maker, from the start again after the last."""
    following = itertools.cycle(makers)
    return lambda number: next(following)()
