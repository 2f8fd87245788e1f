"""Comparison of each op of a forward pass with its limits: bytes over bandwidth, operations over GEMM rate.

Bytes are the unavoidable ones: every input read once, every output written once. The bandwidth is that of reading data
of the same size, so that cached data is compared with the cache's speed; it is measured in turns with the op, because a
machine's memory may be slower from one minute to the next, and is a median like the op's time. Element-wise ops count
bytes alone; bfloat16 and 8-bit products are compared with the GEMM rate of their type.

T tokens · S sequences · E hidden size · F feed-forward size · H query heads · K kv heads · D head size · R rotated
pairs · N blocks · B slots per block · W blocks per table · I, O input and output features
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from batchinfer_kernels.contract import AttentionFacts, ScoreRule, StepInputs
from batchinfer_kernels.formats import Precision

from batchinfer.bench.machine import Machine, gemm_rate, readings
from batchinfer.bench.table import number, table
from batchinfer.bench.timing import Timing, time_in_turn
from batchinfer.io.fetch import fetch_model
from batchinfer.layers.linear import GatedLinear, Linear
from batchinfer.models.config import ModelConfig, load_config
from batchinfer.ops.backend import Backend
from batchinfer.ops.choose import available_backends
from batchinfer.runner.sample_tokens import argmax
from batchinfer.spec import StorageSpec

Work = Callable[[], object]
MakeWork = Callable[[Backend], Work]

_BLOCK_SIZE = 16
_DECODES, _CONTEXT, _PROMPT = 64, 512, 1024
_TOKENS = (64, 1024)  # of element-wise ops: a step of decodes, and one with prompts
_ROWS = (1, 8, 16, 32, 64, 256, 2048)
_NARROW_ROWS = (1, 64, 256)  # of linear layers in bfloat16 and in 8 bits
_HEAD_ROWS = 256  # more rows than that do not reach an LM head at once
_MOST_KV_BYTES = 1 << 29  # of all layers: no cache holds as much
_BUDGET_S = 0.3
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shapes:
    """Shapes of a model; the defaults are SmolLM2-135M's."""

    name: str = "SmolLM2-135M"
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    feed_forward: int = 1536
    vocabulary: int = 49152

    @classmethod
    def of(cls, config: ModelConfig, name: str) -> Shapes:
        attention = config.attention
        return cls(
            name,
            len(config.layers),
            config.hidden_size,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_size,
            config.mlp.size,
            config.vocab_size,
        )


def shapes_of(model: str, storage: StorageSpec) -> Shapes:
    """Return the shapes in a model's configuration; its weights are not read. Raises ModelError."""
    return Shapes.of(load_config(fetch_model(model, storage, weights=False).path), model)


@dataclass(frozen=True)
class Case:
    """An op on some shape. `make` prepares its data for a backend, and returns the call.

    The same data is used again only after `turns` calls. `dtype` is the type of the multiplication.
    """

    op: str
    shape: str
    data_bytes: int
    operations: int
    make: MakeWork
    turns: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def held_bytes(self) -> int:
        """Return what a cache would have to hold."""
        return self.turns * self.data_bytes


@dataclass(frozen=True)
class Measured:
    """Result of one case. `limit_s` is the longer bound, `bound` names it; `fits` is the cache that holds the data."""

    op: str
    shape: str
    backend: str
    min_s: float
    median_s: float
    samples: int
    limit_s: float
    bound: str
    data_bytes: int
    operations: int
    fits: str

    @property
    def times_over(self) -> float:
        return self.median_s / self.limit_s

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "times_over_limit": self.times_over}


@torch.inference_mode()
def measure(shapes: Shapes, machine: Machine, cases: Sequence[Case] | None = None) -> Iterator[Measured]:
    """Measure every case on every backend that can serve here; backends take turns."""

    @cache
    def rate(dtype: torch.dtype) -> float:
        return machine.gemm_per_s if dtype == torch.float32 else gemm_rate(dtype)

    backends = available_backends()
    for case in all_cases(shapes) if cases is None else cases:
        timings, bytes_per_s = _in_turn(case, backends)
        for backend, timing in timings.items():
            yield _against_limit(case, backend, timing, machine, bytes_per_s, rate(case.dtype))


def _in_turn(case: Case, backends: Sequence[Backend]) -> tuple[dict[str, Timing], float]:
    """Return the times of every backend by name, and the bytes per second that as much data was read with."""
    works = {backend.capabilities.name: case.make(backend) for backend in backends}
    ways, read_bytes = readings(case.data_bytes, case.turns)
    # a whole step's layers each time: those of a turn's first step come from farther away
    timings = time_in_turn(works | ways, _BUDGET_S, least=case.turns, uncounted=case.turns)
    fastest = min(timings.pop(way).median_s for way in ways)
    return timings, read_bytes / fastest


def _against_limit(
    case: Case, backend: str, timing: Timing, machine: Machine, bytes_per_s: float, rate: float
) -> Measured:
    moving, computing = case.data_bytes / bytes_per_s, case.operations / rate
    return Measured(
        op=case.op,
        shape=case.shape,
        backend=backend,
        min_s=timing.min_s,
        median_s=timing.median_s,
        samples=timing.samples,
        limit_s=max(moving, computing),
        bound="bytes" if moving >= computing else "arithmetic",
        data_bytes=case.data_bytes,
        operations=case.operations,
        fits=_cache_of(case.held_bytes, machine),
    )


def _cache_of(data_bytes: int, machine: Machine) -> str:
    """Return the first cache that holds the data; each core has its own of the lower two levels."""
    for name, held in machine.caches.items():
        if data_bytes <= held * (machine.threads if name in ("L1", "L2") else 1):
            return name
    return "memory"


# -- cases ---------------------------------------------------------------------------------------------------------


def all_cases(shapes: Shapes) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    attention = [case for dtype in dtypes for case in _decodes(shapes, dtype)]
    attention += [_attention(shapes, _PROMPT, _PROMPT, 1, dtype) for dtype in dtypes]
    return [*attention, *(case for tokens in _TOKENS for case in _element_wise(shapes, tokens)), *_linears(shapes)]


def _decodes(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    """Yield decodes over one layer's KV, and over that of as many layers as no cache holds."""
    one = _attention(shapes, 1, _CONTEXT, _DECODES, dtype)
    yield one
    layers = min(shapes.layers, -(-_MOST_KV_BYTES // one.data_bytes))
    if layers > 1:
        yield _attention(shapes, 1, _CONTEXT, _DECODES, dtype, layers)


def _attention(shapes: Shapes, queries: int, context: int, sequences: int, dtype: torch.dtype, layers: int = 1) -> Case:
    """Return attention of the `queries` last tokens of each of `sequences` contexts, over all tokens up to itself.

    Each call has the KV of the next one of `layers`, as in a step, where a cache keeps none of it for the next step.
    All write to the same memory, as a step's layers do.
    """
    tokens = queries * sequences
    heads, size = shapes.heads, shapes.head_size
    seen = sequences * sum(range(context - queries + 1, context + 1))
    kv_bytes = 2 * sequences * context * shapes.kv_heads * size * dtype.itemsize

    def make(backend: Backend) -> Work:
        blocks = -(-context // _BLOCK_SIZE)
        order = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(1))
        tables_SW = order.view(sequences, blocks).to(torch.int32)
        cache_shape = (len(order), 2, shapes.kv_heads, _BLOCK_SIZE, size)
        caches = [torch.rand(cache_shape).to(dtype) for _ in range(layers)]
        q_THD, out_THD = torch.rand(tokens, heads, size), torch.empty(tokens, heads, size)
        step = _step(torch.arange(tokens), tables_SW, queries, context)
        index = backend.prepare(step, caches[0], AttentionFacts(heads, (None,), q_THD.dtype))
        rule = ScoreRule(size**-0.5)
        following = itertools.cycle(caches)
        return lambda: backend.paged_attention(q_THD, next(following), index, rule, out_THD)

    what = f"{sequences} decodes x {context}" if queries == 1 else f"prompt of {queries}"
    what += f", {layers} layers in turn" if layers > 1 else ""
    kind = str(dtype).removeprefix("torch.")
    data_bytes = kv_bytes + 2 * tokens * heads * size * _FLOAT
    return Case("paged_attention", f"{what}, {kind} KV", data_bytes, 4 * seen * heads * size, make, layers)


def _element_wise(shapes: Shapes, tokens: int) -> Iterator[Case]:
    hidden, feed = shapes.hidden, shapes.feed_forward
    kv, size = shapes.kv_heads, shapes.head_size
    turned = shapes.heads + kv
    shape = f"{tokens} tokens"

    def norm(backend: Backend) -> Work:
        x_TE, weight_E = torch.rand(tokens, hidden), torch.rand(hidden)
        return lambda: backend.rms_norm(x_TE, weight_E, 1e-5)

    def add_norm(backend: Backend) -> Work:
        x_TE, residual_TE, weight_E = torch.zeros(tokens, hidden), torch.rand(tokens, hidden), torch.rand(hidden)
        return lambda: backend.add_rms_norm(x_TE, residual_TE, weight_E, 1e-5)

    def turn_and_write(backend: Backend) -> Work:
        angles_TR = torch.rand(tokens, size // 2)
        cos_sin = angles_TR.cos(), angles_TR.sin()
        blocks = -(-tokens // _BLOCK_SIZE)
        q_THD, k_TKD, v_TKD = torch.split(torch.rand(tokens, turned + kv, size), [shapes.heads, kv, kv], dim=1)
        cache = torch.zeros(blocks, 2, kv, _BLOCK_SIZE, size)
        step = _step(torch.arange(tokens), torch.arange(blocks, dtype=torch.int32)[None], tokens, tokens)
        index = backend.prepare(step, cache, AttentionFacts(shapes.heads, (None,), q_THD.dtype))
        return lambda: backend.rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, cache, index)

    def silu(backend: Backend) -> Work:
        x_T2F = torch.rand(tokens, 2 * feed)
        return lambda: backend.silu_mul(x_T2F)

    def gelu(backend: Backend) -> Work:
        x_T2F = torch.rand(tokens, 2 * feed)
        return lambda: backend.gelu_mul(x_T2F)

    yield Case("rms_norm", shape, 2 * tokens * hidden * _FLOAT, 0, norm)
    yield Case("add_rms_norm", shape, 4 * tokens * hidden * _FLOAT, 0, add_norm)
    moved = 2 * turned + 2 * kv + kv + 1  # turned in place, written, values read, angles
    yield Case("rope_kv_write", shape, tokens * moved * size * _FLOAT, 0, turn_and_write)
    yield Case("silu_mul", shape, 3 * tokens * feed * _FLOAT, 0, silu)
    yield Case("gelu_mul", shape, 3 * tokens * feed * _FLOAT, 0, gelu)


def _step(slots_T: torch.Tensor, tables_SW: torch.Tensor, queries: int, context: int) -> StepInputs:
    """Return a step in which each sequence has `queries` tokens, the last of a context of `context`."""
    sequences = len(tables_SW)
    return StepInputs(
        tokens_T=slots_T,
        positions_T=slots_T,
        slots_T=slots_T,
        block_tables_SW=tables_SW,
        query_starts_X=torch.arange(0, sequences * queries + 1, queries),
        lengths_S=torch.full((sequences,), context),
        prompt_S=torch.full((sequences,), queries > 1),
        output_rows_N=slots_T,
        max_length=context,
    )


def _linears(shapes: Shapes) -> Iterator[Case]:
    inner = shapes.heads * shapes.head_size
    layers = {
        "qkv": (shapes.hidden, inner + 2 * shapes.kv_heads * shapes.head_size),
        "out": (inner, shapes.hidden),
        "down": (shapes.feed_forward, shapes.hidden),
    }
    for dtype, numbers_of_rows in ((torch.float32, _ROWS), (torch.bfloat16, _NARROW_ROWS), (torch.int8, _NARROW_ROWS)):
        for name, (wide, high) in layers.items():
            for rows in numbers_of_rows:
                yield _linear(name, wide, high, rows, dtype)
        for rows in numbers_of_rows:
            yield _gated_linear(shapes.hidden, shapes.feed_forward, rows, dtype)
    for rows in (rows for rows in _ROWS if rows <= _HEAD_ROWS):
        yield _linear("lm_head", shapes.hidden, shapes.vocabulary, rows, torch.float32)
        yield _greedy_head(shapes.hidden, shapes.vocabulary, rows)


def _linear(name: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> Case:
    data_bytes = in_features * out_features * dtype.itemsize + rows * (in_features + out_features) * _FLOAT
    shape = f"{name} {in_features}x{out_features}, {rows} rows{_in(dtype)}"
    work = _packed(lambda backend: Linear(backend, in_features, out_features), rows, dtype)
    return Case("linear", shape, data_bytes, 2 * rows * in_features * out_features, work, dtype=dtype)


def _gated_linear(in_features: int, size: int, rows: int, dtype: torch.dtype) -> Case:
    data_bytes = 2 * in_features * size * dtype.itemsize + rows * (in_features + size) * _FLOAT
    shape = f"gate_up {in_features}x{2 * size}, {rows} rows{_in(dtype)}"
    work = _packed(lambda backend: GatedLinear(backend, in_features, size, "silu"), rows, dtype)
    return Case("gated_linear", shape, data_bytes, 4 * rows * in_features * size, work, dtype=dtype)


def _greedy_head(in_features: int, out_features: int, rows: int) -> Case:
    """Find the largest logits by bounds, or without bounds among all logits; the limit is that of the former."""
    dtype = torch.bfloat16

    def make(backend: Backend) -> Work:
        head, x_NI = _ready(Linear(backend, in_features, out_features), torch.float32), torch.randn(rows, in_features)
        bounds = backend.argmax_bounds(head.matrix)
        if bounds is None:
            return lambda: argmax(head(x_NI))
        return lambda: backend.linear_argmax(x_NI, bounds)

    data_bytes = in_features * out_features * dtype.itemsize + rows * in_features * _FLOAT
    shape = f"lm_head {in_features}x{out_features}, {rows} rows{_in(dtype)}"
    return Case("linear_argmax", shape, data_bytes, 2 * rows * in_features * out_features, make, dtype=dtype)


def _in(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"


def _packed(layer: Callable[[Backend], Linear], rows: int, dtype: torch.dtype) -> MakeWork:
    def make(backend: Backend) -> Work:
        linear = _ready(layer(backend), dtype)
        x_TI = torch.rand(rows, linear.in_features)
        return lambda: linear(x_TI)

    return make


def _ready(layer: Linear, dtype: torch.dtype) -> Linear:
    weight_OI = torch.empty(layer.out_features, layer.in_features).uniform_(-0.1, 0.1)
    layer.pack_weight(weight_OI, Precision(str(dtype).removeprefix("torch.")))
    return layer


def describe(found: Sequence[Measured]) -> str:
    header = ("op", "shape", "backend", "fits", "bound by", "min ms", "median", "limit ms", "times limit")
    rows = [
        (
            one.op,
            one.shape,
            one.backend,
            one.fits,
            one.bound,
            *(number(1e3 * seconds) for seconds in (one.min_s, one.median_s, one.limit_s)),
            number(one.times_over),
        )
        for one in found
    ]
    return table(header, rows, left=5)
