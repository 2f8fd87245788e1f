"""Rates of single ops on a device: bytes per second of what reads memory, operations per second of products.

Bytes are the unavoidable ones, inputs once and outputs once; an op whose data a cache would hold takes turns over
several copies of it. The device's own limits are measured beside them, with a copy and with one large product.

T tokens · S sequences · N rows · H query heads · K KV heads · D head size · E hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from batchinfer_kernels.contract import AttentionFacts, ScoreRule, StepInputs
from batchinfer_kernels.formats import Precision
from batchinfer_kernels.steps import SampledRows, SampleRows, SeatState

from tests.gpu.rig import Rig, in_turn

_BLOCK_SIZE = 16


class Shapes(NamedTuple):
    """Sizes of a model, and of the batches that its ops are measured with."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    decodes: tuple[tuple[int, int], ...] = ((64, 1024), (256, 600), (8, 16384))  # sequences, context
    prompts: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 8192))  # tokens, context with them
    rows: tuple[int, ...] = (64, 256, 2048)
    copied_bytes: int = 1 << 31
    product: int = 8192
    cache_bytes: int = 1 << 28  # more than any cache holds

    @property
    def inner(self) -> int:
        return self.heads * self.head_size


QWEN3_06B = Shapes("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151_936)
LLAMA3_8B = Shapes("Llama-3-8B", 4096, 32, 8, 128, 14_336, 128_256)
TINY = Shapes("tiny", 32, 4, 2, 16, 48, 199, ((3, 40), (2, 70)), ((20, 20), (9, 40)), (2, 5), 1 << 16, 64, 1 << 10)


class Rate(NamedTuple):
    """One op: its time, and what it moved and computed in it."""

    op: str
    shape: str
    seconds: float
    moved_bytes: int
    operations: int = 0

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.seconds

    @property
    def operations_per_s(self) -> float:
        return self.operations / self.seconds


def device_limits(rig: Rig, shapes: Shapes, dtype: torch.dtype) -> tuple[Rate, Rate]:
    """Return the rates of copying memory and of one large product."""
    source = torch.ones(shapes.copied_bytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    copied = rig.seconds_of(lambda number: target.copy_(source))
    size = shapes.product
    a, b = (torch.randn(size, size, device=rig.device).to(dtype) for _ in range(2))
    multiplied = rig.seconds_of(lambda number: a @ b)
    return (
        Rate("copy", f"{shapes.copied_bytes >> 20} MiB", copied, 2 * shapes.copied_bytes),
        Rate("product", f"{size} cubed", multiplied, 3 * size * size * dtype.itemsize, 2 * size**3),
    )


def op_rates(rig: Rig, shapes: Shapes, dtype: torch.dtype, float8: bool) -> Iterator[Rate]:
    """Yield the rates of all ops of a model with activations in `dtype`. float8: with a cache of that format too."""
    for kv_dtype in (dtype, torch.float8_e4m3fn) if float8 else (dtype,):
        for sequences, context in shapes.decodes:
            yield _attention(rig, shapes, (sequences, 1, context), dtype, kv_dtype)
        for tokens, context in shapes.prompts:
            yield _attention(rig, shapes, (1, tokens, context), dtype, kv_dtype)
    for rows in shapes.rows:
        yield from _linears(rig, shapes, rows, dtype)
        yield from _element_wise(rig, shapes, rows, dtype)
    yield from _sampling(rig, shapes, max(2, shapes.rows[0]))


def _attention(
    rig: Rig, shapes: Shapes, batch: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype
) -> Rate:
    sequences, queries, context = batch
    tokens, kv_heads, size = sequences * queries, shapes.kv_heads, shapes.head_size
    blocks = -(-context // _BLOCK_SIZE)
    cache_shape = (sequences * blocks, 2, kv_heads, _BLOCK_SIZE, size)
    kv_bytes = 2 * sequences * context * kv_heads * size * kv_dtype.itemsize
    caches = [
        torch.randn(cache_shape, dtype=dtype, device=rig.device).to(kv_dtype)
        for _ in range(max(1, min(4, shapes.cache_bytes // kv_bytes)))
    ]
    q_THD = torch.randn(tokens, shapes.heads, size, dtype=dtype, device=rig.device)
    step = _step(rig, sequences, queries, context)
    index = rig.backend.prepare(step, caches[0], AttentionFacts(shapes.heads, (None,), dtype))
    out_THD = torch.empty_like(q_THD)

    def attend(kv_N2KBD: torch.Tensor) -> object:
        return rig.backend.paged_attention(q_THD, kv_N2KBD, index, ScoreRule(size**-0.5), out_THD)

    seen = sequences * sum(range(context - queries + 1, context + 1))
    return Rate(
        "decode attention" if queries == 1 else "prompt attention",
        _with_format(sequences, queries, context, kv_dtype),
        rig.seconds_of(in_turn([partial(attend, cache) for cache in caches])),
        kv_bytes + 2 * tokens * shapes.inner * dtype.itemsize,
        4 * seen * shapes.inner,
    )


def _with_format(sequences: int, queries: int, context: int, kv_dtype: torch.dtype) -> str:
    batch = f"{sequences} x {context:,}" if queries == 1 else f"{queries:,} of {context:,}"
    return f"{batch}, {str(kv_dtype).removeprefix('torch.')}"


def _step(rig: Rig, sequences: int, queries: int, context: int) -> StepInputs:
    """Return a step in which each sequence has the last `queries` tokens of its context, in scattered blocks."""
    blocks = -(-context // _BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    tables_SW = torch.randperm(sequences * blocks, generator=generator).view(sequences, blocks)
    positions = torch.arange(context - queries, context)
    slots_T = (tables_SW[:, positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE).flatten()

    def on_device(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32).to(rig.device)

    return StepInputs(
        tokens_T=on_device(torch.zeros(sequences * queries)),
        positions_T=on_device(positions.repeat(sequences)),
        slots_T=on_device(slots_T),
        block_tables_SW=on_device(tables_SW),
        query_starts_X=on_device(torch.arange(sequences + 1) * queries),
        lengths_S=on_device(torch.full((sequences,), context)),
        prompt_S=torch.full((sequences,), queries > 1, device=rig.device),
        output_rows_N=None,
        max_length=context,
        has_prompts=queries > 1,
    )


def _linears(rig: Rig, shapes: Shapes, rows: int, dtype: torch.dtype) -> Iterator[Rate]:
    precision = Precision(str(dtype).removeprefix("torch."))
    layers = {
        "qkv": (shapes.hidden, shapes.inner + 2 * shapes.kv_heads * shapes.head_size),
        "out": (shapes.inner, shapes.hidden),
        "gate_up": (shapes.hidden, 2 * shapes.feed_forward),
        "down": (shapes.feed_forward, shapes.hidden),
    }
    for name, (inputs, outputs) in layers.items():
        weight_bytes = inputs * outputs * dtype.itemsize
        matrices = [
            rig.backend.pack(torch.randn(outputs, inputs, device=rig.device).to(dtype), precision)
            for _ in range(max(1, min(16, shapes.cache_bytes // weight_bytes)))
        ]
        x_NI = torch.randn(rows, inputs, device=rig.device).to(dtype)
        calls = [partial(rig.backend.linear, x_NI, matrix, None) for matrix in matrices]
        moved = weight_bytes + rows * (inputs + outputs) * dtype.itemsize
        seconds = rig.seconds_of(in_turn(calls))
        yield Rate(f"linear {name}", f"{rows:,} rows", seconds, moved, 2 * rows * inputs * outputs)


def _element_wise(rig: Rig, shapes: Shapes, rows: int, dtype: torch.dtype) -> Iterator[Rate]:
    """Yield norms, activation and rope with KV write, over copies of their data that no cache holds together."""
    backend, hidden, size = rig.backend, shapes.hidden, shapes.head_size
    weight_E = torch.ones(hidden, dtype=dtype, device=rig.device)
    heads = shapes.heads + 2 * shapes.kv_heads
    blocks = -(-rows // _BLOCK_SIZE)
    step = _step(rig, 1, rows, rows)
    angles_TR = torch.rand(rows, size // 2, device=rig.device)
    cos_sin = angles_TR.cos(), angles_TR.sin()

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=rig.device)

    def norm() -> Callable[[], object]:
        return partial(backend.rms_norm, empty(rows, hidden), weight_E, 1e-5)

    def add_norm() -> Callable[[], object]:
        return partial(backend.add_rms_norm, empty(rows, hidden), empty(rows, hidden), weight_E, 1e-5)

    def silu() -> Callable[[], object]:
        return partial(backend.silu_mul, empty(rows, 2 * shapes.feed_forward))

    def turn_and_write() -> Callable[[], object]:
        q_THD, k_TKD, v_TKD = empty(rows, heads, size).split([shapes.heads, shapes.kv_heads, shapes.kv_heads], 1)
        kv_N2KBD = empty(blocks, 2, shapes.kv_heads, _BLOCK_SIZE, size)
        index = backend.prepare(step, kv_N2KBD, AttentionFacts(shapes.heads, (None,), dtype))
        return partial(backend.rope_kv_write, q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index)

    numbers = {
        "rms_norm": (norm, 2 * hidden),
        "add_rms_norm": (add_norm, 4 * hidden),
        "silu_mul": (silu, 3 * shapes.feed_forward),
        "rope_kv_write": (turn_and_write, (2 * shapes.heads + 5 * shapes.kv_heads) * size),
    }
    for name, (make, per_row) in numbers.items():
        moved = rows * per_row * dtype.itemsize
        calls = [make() for _ in range(max(1, min(64, shapes.cache_bytes // moved)))]
        if name == "rope_kv_write":
            moved += 2 * angles_TR.nbytes
        yield Rate(name, f"{rows:,} tokens", rig.seconds_of(in_turn(calls)), moved)


def _sampling(rig: Rig, shapes: Shapes, rows: int) -> Iterator[Rate]:
    """Yield sampling and logprobs of one row per seat, against reading the logits once."""
    steps = rig.backend.steps
    assert steps is not None, "the backend has no kernels of steps"
    logits_NV = torch.randn(rows, shapes.vocabulary, device=rig.device)
    number_N = torch.arange(rows, dtype=torch.int32, device=rig.device)
    where = SampleRows(number_N, number_N, number_N, number_N)
    out = SampledRows(torch.empty_like(number_N), torch.empty_like(number_N))
    kinds = {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top_k and top_p": (1.0, 50, 0.9)}
    for name, (temperature, top_k, top_p) in kinds.items():
        state = _seats(rig, rows, temperature, top_k, top_p)
        seconds = rig.seconds_of(lambda number, state=state: steps.sample_rows(logits_NV, where, state, out))
        yield Rate("sampling", f"{rows:,} rows, {name}", seconds, logits_NV.nbytes)
    seconds = rig.seconds_of(lambda number: steps.gather_logprobs(logits_NV, number_N, 5))
    yield Rate("logprobs", f"{rows:,} rows, 5 best", seconds, logits_NV.nbytes)


def _seats(rig: Rig, seats: int, temperature: float, top_k: int, top_p: float) -> SeatState:
    def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((seats + 1,), value, dtype=dtype, device=rig.device)

    return SeatState(
        block_tables_PW=torch.zeros(seats + 1, 1, dtype=torch.int32, device=rig.device),
        last_tokens_P=filled(0, torch.int32),
        prompt_tokens_P=filled(1, torch.int32),
        keys_P=torch.arange(seats + 1, device=rig.device),
        temperature_P=filled(temperature, torch.float32),
        top_k_P=filled(top_k, torch.int32),
        log_min_p_P=filled(float("-inf"), torch.float32),
        top_p_P=filled(top_p, torch.float64),
    )
