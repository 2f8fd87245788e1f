"""Memory of a device: what its largest step and its graphs take is measured, and the KV cache gets what is left.

A runner with a KV cache of a few blocks runs the largest step and captures the largest graphs; it is dropped, and one
with the real cache takes its place. So the memory that a step needs is known, not guessed, before the first row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from batchinfer.errors import ModelError
from batchinfer.log import log
from batchinfer.models.decoder import Decoder
from batchinfer.ops.device_work import make_graphs, make_streams
from batchinfer.ops.out_of_memory import room_for
from batchinfer.ops.streams import DeviceMemory, Streams
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner
from batchinfer.runner.kv_cache import bytes_per_token, whole_blocks
from batchinfer.spec import EngineSpec

_TRIAL_BLOCKS = 2
_SPARE_SHARE = 0.04  # of what the weights leave: gaps between tensors, and whatever else starts on the device
_LEAST_TOKENS = 32  # what engine.kv_cache_tokens asks for at least
_SMALLER_STEPS = "lower engine.max_step_tokens or engine.max_num_seqs"


class DeviceUse(NamedTuple):
    """Memory of a device in bytes, by what it is for. `left` is for the KV cache."""

    weights: int
    step: int
    graphs: int
    spare: int
    left: int

    def __str__(self) -> str:
        return (
            f"weights {gib(self.weights)}, a step of the largest size {gib(self.step)}, graphs {gib(self.graphs)}, "
            f"spare {gib(self.spare)}"
        )


class BlockSize(NamedTuple):
    """Size of a block of the KV cache: in tokens, and in bytes over all layers."""

    tokens: int
    num_bytes: int


def load_device_runner(decoder: Decoder, engine: EngineSpec, kv_dtype: torch.dtype) -> tuple[DeviceRunner, int]:
    """Return a runner that has captured its graphs, and the blocks of its KV cache.

    Raises ModelError, with the setting to lower, for a device that is too small.
    """
    backend, config = decoder.backend, decoder.config
    streams = make_streams(backend.device)
    limits = StepLimits(
        engine.max_num_seqs, engine.max_step_tokens, config.context_tokens, engine.block_size, config.vocab_size
    )

    def make_runner(num_blocks: int) -> DeviceRunner:
        return DeviceRunner(decoder, streams, make_graphs(backend), limits, num_blocks, kv_dtype)

    use = measure_use(make_runner, streams, engine)
    block = BlockSize(engine.block_size, bytes_per_token(config.kv_shape, kv_dtype) * engine.block_size)
    num_blocks = size_kv_cache(use, block, engine, config.context_tokens)
    with room_for(f"a KV cache of {num_blocks * block.tokens} tokens and the graphs", "lower engine.kv_cache_tokens"):
        runner = make_runner(num_blocks)
        runner.capture_graphs()
    streams.reset_peak()  # what the runs before each capture took is of no more use
    log.info(
        "device memory",
        weights=gib(use.weights),
        largest_step=gib(use.step),
        graphs=gib(use.graphs),
        kv_cache=gib((num_blocks + 1) * block.num_bytes),
        spare=gib(use.spare),
    )
    return runner, num_blocks


def measure_use(make_runner: Callable[[int], DeviceRunner], streams: Streams, engine: EngineSpec) -> DeviceUse:
    """Measure what the largest step and all graphs take, with a runner of a few blocks, which is dropped again.

    The weights are on the device already. `make_runner` takes a number of blocks.
    """
    streams.reset_peak()
    before = streams.memory()
    with room_for(f"a step of {engine.max_step_tokens} tokens and {engine.max_num_seqs} sequences", _SMALLER_STEPS):
        runner = make_runner(_TRIAL_BLOCKS)
        runner.run_largest_step()
        after_step = streams.memory()
        largest = runner.ladder.largest
        runner.capture_graphs(largest)
    after_graphs = streams.memory()
    step, graphs = _growth(before, after_step), _growth(after_step, after_graphs)
    # the other graphs share the largest ones' memory for tensors; what the driver holds for each comes on top
    tensors = max(0, after_graphs.reserved - after_step.reserved)
    graphs += max(0, graphs - tensors) * (len(runner.ladder.rungs) - len(largest)) // len(largest)
    del runner
    streams.reset_peak()
    spare = int(before.free * _SPARE_SHARE)
    return DeviceUse(before.reserved, step, graphs, spare, max(0, before.free - step - graphs - spare))


def size_kv_cache(use: DeviceUse, block: BlockSize, engine: EngineSpec, context_tokens: int) -> int:
    """Return the blocks of the KV cache: what engine.kv_cache_tokens asks for, or all that the seats can use and fits.

    One block more is allocated: it belongs to no sequence. Raises ModelError, with what would fit.
    """
    fits = max(0, use.left // block.num_bytes - 1)
    if engine.kv_cache_tokens is None:
        most = engine.max_num_seqs * -(-context_tokens // block.tokens)
        if fits * block.tokens < min(_LEAST_TOKENS, context_tokens):
            raise ModelError(f"no room for a KV cache on the device ({use}): {_SMALLER_STEPS}")
        return min(fits, most)
    wanted = whole_blocks(engine.kv_cache_tokens, block.tokens)
    if wanted > fits:
        raise ModelError(
            f"a KV cache of {engine.kv_cache_tokens} tokens takes {gib((wanted + 1) * block.num_bytes)}, and {use} "
            f"leave {gib(use.left)} of the device: {fits * block.tokens} tokens would fit; lower "
            "engine.kv_cache_tokens, engine.max_step_tokens or engine.max_num_seqs"
        )
    return wanted


def gib(num_bytes: int) -> str:
    """Return a size in GiB for messages."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _growth(before: DeviceMemory, after: DeviceMemory) -> int:
    """Return the bytes taken between two looks: at most at once by tensors, or in all as the driver counts."""
    return max(0, after.peak - before.peak, before.free - after.free)
