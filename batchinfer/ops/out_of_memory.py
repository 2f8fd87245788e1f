"""Errors that say that a device has no memory left, whoever raises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchinfer.errors import ModelError

_SAID = ("out of memory", "_ALLOC_FAILED", "OUT_OF_MEMORY", "MemoryAllocation")
"""Parts of the messages of drivers, cuBLAS, cuDNN, graphs and Triton: a few of them raise RuntimeError alone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the device, or pinned memory of the host, had no room for what `error` ended."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _SAID)


@contextmanager
def room_for(what: str, advice: str) -> Iterator[None]:
    """Raise ModelError, with advice, if the device has no room for what is allocated in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ModelError(f"no room on the device for {what}: {advice} ({reason})") from None
