"""Triton backend: GPU kernels, one file per op, and the vendor's matrix products.

Importing this package imports no triton: a machine without a GPU asks `problem` alone.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from batchinfer_kernels.contract import Report

if TYPE_CHECKING:
    from batchinfer_kernels.triton.backend import TritonBackend

__all__ = ["make_backend", "problem"]


def problem(device: str) -> str | None:
    """Return why the kernels cannot run on the device here, None if they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def make_backend(device: str, report: Report) -> TritonBackend:
    """Return the backend of a device; of the CPU too, where Triton's interpreter runs the kernels (tests)."""
    from batchinfer_kernels.triton.backend import TritonBackend

    return TritonBackend(torch.device(device), report)
