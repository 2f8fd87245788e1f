"""Writing of weights from files into a device's memory, through a little memory of the host.

State: two pinned buffers, and the copies from them that go on. Owner: the checkpoint that reads files. Flow: `write`
has rows put into one buffer while the copy from the other goes on, and waits only for the buffer whose turn it is.
Failure: what reading raises; the tensor is then written in part.

N rows · C columns
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from batchinfer.ops.resources import HOST
from batchinfer.ops.streams import CudaStreams, Download, Streams

STAGING_BYTES = 64 << 20
"""Bytes of a buffer: above a few MiB, copies take no longer per byte."""

Fill = Callable[[range, Tensor], None]
"""Function that puts rows into host memory: contiguous [rows, C], in the dtype that is written."""


class Staging(Protocol):
    """Way from files into tensors."""

    def write(self, target_NC: Tensor, fill: Fill) -> None:
        """Write a contiguous tensor whose rows `fill` puts into host memory, all in order, some at a time."""
        ...


class HostWrites:
    """Staging of tensors in the host's memory: they are filled where they lie."""

    def write(self, target_NC: Tensor, fill: Fill) -> None:
        fill(range(len(target_NC)), target_NC)


HOST_WRITES = HostWrites()


class StagingRing:
    """Two pinned buffers in turns: one is filled while the copy from the other goes on."""

    def __init__(self, streams: Streams, device: torch.device, buffer_bytes: int = STAGING_BYTES) -> None:
        self._streams = streams
        self._buffer_bytes = buffer_bytes
        self._marker = torch.zeros(1, dtype=torch.uint8, device=device)  # its download ends after what came before
        self._idle: list[tuple[Tensor, Download | None]] = [(streams.pinned(buffer_bytes), None) for _ in range(2)]

    def write(self, target_NC: Tensor, fill: Fill) -> None:
        if not len(target_NC):
            return
        row_bytes = target_NC[0].nbytes
        first = 0
        for part_NC in torch.split(target_NC, max(1, self._buffer_bytes // row_bytes)):
            pinned = self._take(part_NC.nbytes)
            numbers_NC = pinned[: part_NC.nbytes].view(part_NC.dtype).view(part_NC.shape)
            fill(range(first, first + len(part_NC)), numbers_NC)
            self._streams.upload(numbers_NC, part_NC)
            self._idle.append((pinned, self._streams.download(self._marker)))
            first += len(part_NC)

    def _take(self, num_bytes: int) -> Tensor:
        """Return the buffer whose copy began first, once that is done; a larger one for a row that does not fit."""
        pinned, copy = self._idle.pop(0)
        if copy is not None:
            copy.wait()
        return pinned if num_bytes <= len(pinned) else self._streams.pinned(num_bytes)


def make_staging(device: torch.device) -> Staging:
    """Return the staging of a device's tensors."""
    return HOST_WRITES if device == HOST else StagingRing(CudaStreams(device), device)
