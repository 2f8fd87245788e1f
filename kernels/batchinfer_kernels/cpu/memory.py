"""Allocation of packed weights, of activations and of the KV cache.

Packed weights are read whole again and again: they lie on large pages, if the system has them. Rows that a linear layer
reads next are padded if their length is a power of two or near it: without, they would evict each other from the first
cache.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

from batchinfer_kernels.cpu.library import Functions

_PAGE_BYTES = 2 << 20  # x86's
_CHUNK_BYTES = 64 << 20  # so that pages are full, of matrices side by side
_LINE_BYTES = 64
_PREFAULT_BYTES = 64 << 20  # ahead of need: a fraction of a step's time
_WAY_BYTES = 2 << 10  # half a way of the first cache: csrc/linear.h copies rows that are whole numbers of it apart


class _Chunks:
    """Arena of large chunks. A chunk lives as long as a tensor in it; its unused end costs only address space."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._left = memoryview(b"")

    def take_bytes(self, size: int) -> memoryview:
        with self._lock:
            if size > len(self._left):
                self._left = _on_large_pages(max(_CHUNK_BYTES, size))
            taken = self._left[:size]
            self._left = self._left[-(-size // _LINE_BYTES) * _LINE_BYTES :]
        return taken


def _on_large_pages(size: int) -> memoryview:
    try:
        memory = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes: {error.strerror}") from None
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE_BYTES
    return memoryview(memory)[start : start + size]


_CHUNKS = _Chunks()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate uninitialised memory on large pages. Raises MemoryError.

    Not for a KV cache: it grows (see `PagedMemory`), by pages that are often at hand already.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(_CHUNKS.take_bytes(size), dtype=dtype).view(*shape)


class PagedMemory:
    """KV cache memory whose pages are faulted in ahead of use, by all threads at once.

    torch leaves it uninitialised: a page costs nothing until it is written. Pages faulted one by one, as tokens are
    written, take several times as long, and threads wait for one another.
    """

    def __init__(self, functions: Functions, layers: list[Tensor]) -> None:
        self.layers = layers
        self._functions = functions
        self._faulted = 0  # blocks, from the first on
        block_bytes = layers[0][0].nbytes
        self._ahead = _PREFAULT_BYTES // (block_bytes * len(layers))

    def prefault(self, blocks: int) -> None:
        """Fault in the pages of the first `blocks` blocks, and of 64 MiB more, unless they are there."""
        if blocks <= self._faulted:
            return
        block_bytes = self.layers[0][0].nbytes
        target = min(len(self.layers[0]), blocks + self._ahead)
        self._functions.populate(
            (ctypes.c_void_p * len(self.layers))(*(x.data_ptr() for x in self.layers)),
            len(self.layers),
            self._faulted * block_bytes,
            target * block_bytes,
            torch.get_num_threads(),
        )
        self._faulted = target


def empty_rows(rows: int, width: int) -> Tensor:
    """Allocate uninitialised float32 [rows, width]; the row stride may exceed width."""
    apart = width + (_LINE_BYTES // 4 if width * 4 % _WAY_BYTES == 0 else 0)
    return torch.empty(rows, apart)[:, :width]
