"""Memory that suits what is read from it.

What is read whole again and again, as packed weights are, lies on large pages, where the system has them. Rows that a
linear layer reads next lie a little apart where their length is a power of two or near it: side by side they would
drive each other out of the first cache.
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

from batchinfer_kernels.cpu.library import functions

_PAGE_BYTES = 2 << 20  # x86's
_CHUNK_BYTES = 64 << 20  # so that pages are full, of matrices side by side
_LINE_BYTES = 64
_WAY_BYTES = 2 << 10  # half a way of the first cache: csrc/linear.h copies rows that are whole numbers of it apart


class _Chunks:
    """A chunk lives as long as a tensor in it; what is never used of it costs address space alone."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._left = memoryview(b"")

    def take(self, size: int) -> memoryview:
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
    """Uninitialised. Raises MemoryError.

    Not for a KV cache: it grows (see `populate`), by pages that are often at hand already.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(_CHUNKS.take(size), dtype=dtype).view(*shape)


def populate(tensors: Sequence[Tensor], first: int, last: int) -> None:
    """Rows first .. last - 1 of dense tensors of one shape get the pages that they lie on, by all threads at once."""
    row_bytes = tensors[0][0].nbytes
    functions().populate(
        (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)),
        len(tensors),
        first * row_bytes,
        last * row_bytes,
        torch.get_num_threads(),
    )


def empty_rows(rows: int, width: int) -> Tensor:
    """Uninitialised float32 [rows, width]; from row to row it may be farther than width."""
    apart = width + (_LINE_BYTES // 4 if width * 4 % _WAY_BYTES == 0 else 0)
    return torch.empty(rows, apart)[:, :width]
