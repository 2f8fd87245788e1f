"""Streams and graphs of the device that a backend computes on."""

from __future__ import annotations

import torch

from batchinfer.ops.backend import Backend
from batchinfer.ops.graphs import CudaGraphs, Graphs, NoGraphs
from batchinfer.ops.pretend import PretendStreams, ReplayedGraphs
from batchinfer.ops.resources import HOST
from batchinfer.ops.streams import CudaStreams, Streams


def make_streams(device: torch.device) -> Streams:
    """Return the streams of a device; on the host those of a pretend device."""
    return PretendStreams() if device == HOST else CudaStreams(device)


def make_graphs(backend: Backend) -> Graphs:
    """Return room for the graphs of one runner."""
    if not backend.capabilities.captures_graphs:
        return NoGraphs()
    return ReplayedGraphs() if backend.device == HOST else CudaGraphs(backend.device)
