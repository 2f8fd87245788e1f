"""Copies between host and device that nobody waits for, and the memory they go through.

A device runs what it is given in order, on its stream; the host goes on at once. Host memory that a copy reads or
writes is pinned, and belongs to the copy until it is done. State: the streams, and pinned memory. Owner: the runner.
Flow: `UploadRing.take` gives a step its buffer, `UploadBuffer.place` uploads into it, `Streams.download` fetches
results on a stream of its own, `Download.wait` is the one place that waits. Failure: errors of kernels that were
launched before show when a download is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

Upload = Callable[[npt.NDArray[Any]], Tensor]
"""Copy of a contiguous array where a device's tensors are. On the host it may be the array itself."""

_ALIGNMENT = 16  # bytes: kernels read uploaded values with wide loads
_LEAST_BYTES = 1 << 16


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes."""

    free: int  # to all processes
    reserved: int  # by this process, for tensors and graphs: in use or kept for later
    peak: int  # most that was reserved since `Streams.reset_peak`


class Download(Protocol):
    """Values on their way to the host."""

    def wait(self) -> Tensor:
        """Wait until the values have come; return them, on the host. Raises what the device could not do until then."""
        ...


class Streams(Protocol):
    """Order of a device's work and of copies from and to the host."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Allocate host memory that copies can use while the host goes on, uint8 [num_bytes]."""
        ...

    def upload(self, source: Tensor, target: Tensor) -> None:
        """Copy pinned memory to the device, after what it was given so far. The source may not change until then."""
        ...

    def download(self, source: Tensor) -> Download:
        """Copy a device tensor to the host, after what computes it and beside what comes later.

        The tensor may not be written again.
        """
        ...

    def synchronize(self) -> None:
        """Wait for everything."""
        ...

    def memory(self) -> DeviceMemory: ...

    def reset_peak(self) -> None:
        """Give back to the device what no tensor uses, and count the peak from now on."""
        ...


class UploadBuffer:
    """Pinned memory for one step's uploads, and as much on the device: values get places one after the other.

    Grows if a step has more to upload than any before. Nothing may be placed after `clear` until the copies are done.
    """

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._used = 0
        self._outgrown: list[tuple[Tensor, Tensor]] = []  # copies from and to these may still go on
        self._allocate(_LEAST_BYTES)

    def place(self, values: npt.NDArray[Any]) -> Tensor:
        """Upload an array, and return it on the device. Nothing waits; the array may change at once."""
        host, device = self._reserve(values.nbytes)
        dtype = torch.from_numpy(values[:0].reshape(-1)).dtype
        host.numpy().view(values.dtype)[:] = values.reshape(-1)
        self._streams.upload(host, device)
        return device.view(dtype).view(values.shape)

    def clear(self) -> None:
        """Forget all values. Call it when the step that uploaded them is known to be done."""
        self._used = 0
        self._outgrown.clear()

    def _reserve(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        start = self._used
        if start + num_bytes > len(self._host):
            self._outgrown.append((self._host, self._twin))
            self._allocate(max(2 * len(self._host), 2 * num_bytes))
            start = 0
        self._used = -(-(start + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        return self._host[start : start + num_bytes], self._twin[start : start + num_bytes]

    def _allocate(self, num_bytes: int) -> None:
        self._host = self._streams.pinned(num_bytes)
        self._twin = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


class UploadRing:
    """Upload buffers of a few steps in flight: each belongs to its step until that is known to be done."""

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._free: list[UploadBuffer] = []

    def take(self) -> UploadBuffer:
        """Return an empty buffer."""
        return self._free.pop() if self._free else UploadBuffer(self._streams, self._device)

    def give_back(self, buffer: UploadBuffer) -> None:
        """Take back the buffer of a step that is done."""
        buffer.clear()
        self._free.append(buffer)


class CudaStreams:
    """Streams of an NVIDIA or AMD GPU: the current stream computes and uploads, another one downloads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def download(self, source: Tensor) -> Download:
        return _CudaDownload(source, self._copies)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def memory(self) -> DeviceMemory:
        stats = torch.cuda.memory_stats(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(free, stats["reserved_bytes.all.current"], stats["reserved_bytes.all.peak"])

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


class _CudaDownload:
    """Copy on the stream of copies, and the event of its end. Keeps the source: its memory is not reused before."""

    def __init__(self, source: Tensor, copies: torch.cuda.Stream) -> None:
        self._source: Tensor | None = source
        self._host = torch.empty(
            source.shape, dtype=source.dtype, pin_memory=True
        )  # torch keeps pinned memory for reuse
        copies.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(copies):
            self._host.copy_(source, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(copies)

    def wait(self) -> Tensor:
        self._done.synchronize()
        self._source = None
        return self._host
