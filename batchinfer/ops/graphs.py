"""Graphs: forward passes that were captured once and are replayed with one launch.

A graph repeats what its body launched: the same kernels on the same addresses with the same numbers from the host. All
that differs between steps lies in tensors that live as long as the graph, its *static* inputs. State: the graphs, by
key. Owner: the runner. Flow: `capture` for each rung of the ladder, the largest first, then `replay` in steps. Failure:
torch's errors; capturing fails if a body waits for the device.

T tokens of a rung · E hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from batchinfer_kernels.contract import StepInputs
from torch import Tensor


class GraphBody(NamedTuple):
    """A forward pass over static tensors: `run` reads `inputs` and `caches` (kv_N2KBD) and writes `hidden_TE`."""

    run: Callable[[], None]
    inputs: StepInputs
    caches: Sequence[Tensor]
    hidden_TE: Tensor


class Graphs(Protocol):
    """Graphs by key."""

    def capture(self, key: Hashable, body: GraphBody) -> None:
        """Capture a body, whose static inputs hold an empty step."""
        ...

    def replay(self, key: Hashable) -> None:
        """Launch a captured body again, with what its static inputs hold now."""
        ...

    def __contains__(self, key: Hashable) -> bool:
        """Return True if there is a graph of this key; steps without one launch their kernels one by one."""
        ...


class NoGraphs:
    """Graphs of a device that captures none."""

    def capture(self, key: Hashable, body: GraphBody) -> None:
        """Do nothing."""

    def replay(self, key: Hashable) -> None:
        raise KeyError(key)

    def __contains__(self, key: Hashable) -> bool:
        return False


class CudaGraphs:
    """CUDA or HIP graphs in one memory pool: they run one after the other, so they may share temporary memory."""

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, key: Hashable, body: GraphBody) -> None:
        """Run the body once, so that kernels are compiled and libraries have their memory; then capture it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body.run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile is no part of it
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            body.run()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs
