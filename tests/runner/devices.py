"""Runners on the pretend device, for tests: padding, unwritten slots and old hidden states are poisoned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from batchinfer_kernels.eager import EagerBackend

from batchinfer.engine.engine import Engine
from batchinfer.models.decoder import Decoder
from batchinfer.models.weights import load_decoder
from batchinfer.ops.graphs import NoGraphs
from batchinfer.ops.pretend import PretendStreams, ReplayedGraphs, pretend_backend
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner
from tests.harness import expect_short_answers, make_engine

CONTEXT = 128


def both_decoders(folder: Path) -> tuple[Decoder, Decoder]:
    """Return a model twice, on plain torch and on the pretend device."""
    return load_decoder(folder, backend=EagerBackend(torch.device("cpu"))), load_decoder(
        folder, backend=pretend_backend()
    )


def device_runner(
    decoder: Any,
    num_blocks: int,
    block_size: int = 4,
    *,
    seats: int = 6,
    step_tokens: int = 24,
    graphs: bool = True,
    context: int = CONTEXT,
) -> DeviceRunner:
    """Return a runner whose KV cache is full of NaN: a read of a slot that was not written shows."""
    limits = StepLimits(seats, step_tokens, context, block_size, decoder.config.vocab_size)
    captured = ReplayedGraphs() if graphs else NoGraphs()
    runner = DeviceRunner(decoder, PretendStreams(), captured, limits, num_blocks)
    runner.capture_graphs()
    for layer in runner.cache.layers:
        layer.fill_(math.nan)
    return runner


def device_engine(
    decoder: Any,
    num_blocks: int,
    block_size: int = 4,
    *,
    seats: int = 6,
    step_tokens: int = 24,
    caching: bool = True,
    graphs: bool = True,
    drafts: int = 0,
) -> Engine:
    """Return an engine over a `device_runner` that preempts."""
    runner = device_runner(decoder, num_blocks, block_size, seats=seats, step_tokens=step_tokens, graphs=graphs)
    engine = make_engine(
        runner, num_blocks, block_size, seats=seats, step_tokens=step_tokens, caching=caching, drafts=drafts
    )
    expect_short_answers(engine.scheduler)
    return engine
