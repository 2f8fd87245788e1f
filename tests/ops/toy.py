"""A third backend, as a folder of kernels/ would be one: it counts its calls and lets the eager backend compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from batchinfer_kernels.eager import EagerBackend

CALLS: Counter[str] = Counter()


class CountingBackend:
    """The eager backend on the host, with its ops counted by name."""

    def __init__(self) -> None:
        self._eager = EagerBackend(torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        CALLS[name] += 1
        return getattr(self._eager, name)


PROBLEM: list[str] = []


def problem(device: str) -> str | None:
    return PROBLEM[0] if PROBLEM else None


def make_backend(device: str, report: Any) -> CountingBackend:
    return CountingBackend()
