"""A pretend device: torch ops on the CPU behind the interfaces of a GPU, for tests and for `bench host`.

It computes at once, so results are right whatever the order of waiting; what goes wrong on a real device is made to
show. Pinned memory that changes before its copy is done is an error, results that nobody waited for do not exist, and a
replayed graph finds poison wherever a real one would find anything.

T tokens of a rung · S sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from time import perf_counter, sleep

import torch
from batchinfer_kernels.eager.backend import EagerBackend
from batchinfer_kernels.eager.step_kernels import EagerStepKernels
from torch import Tensor

from batchinfer.ops.graphs import GraphBody
from batchinfer.ops.resources import HOST
from batchinfer.ops.streams import DeviceMemory, Download

_DRAFT_ROWS = 32


class PretendBackend(EagerBackend):
    """The eager backend with the capabilities of a device whose host runs ahead."""

    def __init__(self) -> None:
        super().__init__(HOST)
        self.capabilities = replace(
            self.capabilities,
            name="pretend device",
            drafts_as_sequences=False,
            max_draft_rows=_DRAFT_ROWS,
            captures_graphs=True,
        )
        self.steps = EagerStepKernels()


class PretendStreams:
    """Streams whose copies are done when a later download is waited for, and not before.

    `gaps_s`: how long the device had nothing to do before each stretch of work that `occupy` announced, in seconds.
    """

    def __init__(self, memory: Callable[[], DeviceMemory] | None = None) -> None:
        """memory: what `memory` returns; None: a device with nothing in it."""
        self.gaps_s: list[float] = []
        self._memory = memory or (lambda: DeviceMemory(1 << 40, 0, 0))
        self._uploads: list[tuple[Tensor, Tensor]] = []  # pinned memory, and a copy as it was at the upload
        self._retired = 0  # uploads that are done
        self._busy_until = 0.0

    def occupy(self, seconds: float) -> None:
        """Keep the device busy for a time, after what it was given so far."""
        now = perf_counter()
        if self._busy_until:
            self.gaps_s.append(max(0.0, now - self._busy_until))
        self._busy_until = max(now, self._busy_until) + seconds

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device=HOST)

    def upload(self, source: Tensor, target: Tensor) -> None:
        self._uploads.append((source, source.clone()))
        target.copy_(source)

    def download(self, source: Tensor) -> Download:
        return _PretendDownload(self, source.clone(), self._retired + len(self._uploads), self._busy_until)

    def synchronize(self) -> None:
        self.finish(self._retired + len(self._uploads), self._busy_until)

    def memory(self) -> DeviceMemory:
        return self._memory()

    def reset_peak(self) -> None:
        """Do nothing: the figures are given."""

    def finish(self, uploads: int, until: float) -> None:
        """Wait until the device's clock shows `until`, when the first `uploads` uploads are done; check these."""
        while (left := until - perf_counter()) > 0:
            sleep(left)
        count = max(0, uploads - self._retired)
        done, self._uploads = self._uploads[:count], self._uploads[count:]
        self._retired += count
        for source, before in done:
            assert torch.equal(source, before), "pinned memory was written before its upload was done"


class _PretendDownload:
    """Download whose values exist once it is waited for."""

    def __init__(self, streams: PretendStreams, values: Tensor, uploads: int, until: float) -> None:
        self._streams = streams
        self._values = values
        self._uploads = uploads
        self._until = until

    def wait(self) -> Tensor:
        self._streams.finish(self._uploads, self._until)
        return self._values


class ReplayedGraphs:
    """Graphs that run their bodies again, in the conditions of a captured one.

    Before a replay, the step is checked against the bounds of the graph, and all hidden states and the last block of
    every cache, which belongs to no sequence, become NaN; after it, hidden states beyond the step's tokens do.
    """

    def __init__(self) -> None:
        self.replays = 0
        self._bodies: dict[Hashable, GraphBody] = {}

    def capture(self, key: Hashable, body: GraphBody) -> None:
        body.run()
        self._bodies[key] = body

    def replay(self, key: Hashable) -> None:
        body = self._bodies[key]
        self.replays += 1
        body.hidden_TE.fill_(math.nan)
        for kv_N2KBD in body.caches:
            kv_N2KBD[-1] = math.nan
        num_tokens = int(body.inputs.query_starts_X[-1])
        _check_padding(body, num_tokens)
        body.run()
        body.hidden_TE[num_tokens:] = math.nan

    def __contains__(self, key: Hashable) -> bool:
        return key in self._bodies


def _check_padding(body: GraphBody, num_tokens: int) -> None:
    """Assert that the step keeps the bounds of the graph, and that its padding is no sequence's."""
    inputs = body.inputs
    lengths_S, counts_S = inputs.lengths_S, inputs.query_starts_X.diff()
    assert not inputs.slots_T[num_tokens:].ge(0).any(), "padding has slots"
    assert inputs.slots_T[:num_tokens].ge(0).all(), "a token has no slot"
    assert not lengths_S[counts_S == 0].any(), "sequences of padding have contexts"
    assert int(lengths_S.max()) <= inputs.max_length, "a context is longer than the graph was captured for"
    assert inputs.has_prompts or int(counts_S.max()) <= inputs.max_queries, "a sequence has too many tokens"
    assert inputs.has_prompts or not inputs.prompt_S.any(), "a prompt in a graph without"


def pretend_backend() -> PretendBackend:
    """Return the backend of the pretend device."""
    return PretendBackend()
