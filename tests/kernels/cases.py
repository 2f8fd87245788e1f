"""The one table of odd shapes and tolerances that every backend of every op is tested with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from batchinfer_kernels.contract import AttentionFacts, StepInputs
from batchinfer_kernels.eager.linear import DenseMatrix
from batchinfer_kernels.formats import BLOCK, BlockMatrix, Precision

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Absolute and relative, for inputs of the order of 1 and results computed in at least float32."""

NORM_SHAPES = [(1, 1), (3, 5), (1, 576), (7, 64), (2, 3, 48), (0, 16), (257, 33)]

# (tokens, heads, head size, rotated pairs)
ROPE_SHAPES = [(1, 1, 2, 1), (5, 3, 8, 4), (4, 2, 10, 3), (0, 2, 8, 4), (33, 12, 64, 32), (3, 1, 96, 36)]

GATED_SHAPES = [(1, 2), (3, 10), (2, 4, 96), (0, 8), (65, 3072)]


# (rows, input features, output features)
LINEAR_SHAPES = [
    (1, 1, 1), (3, 5, 7), (0, 4, 4), (2, 33, 31), (14, 64, 32), (15, 64, 33), (29, 576, 96), (61, 1537, 40),
    (7, 512, 70), (300, 1024, 65), (5, 3100, 64), (1000, 24, 8),
]  # fmt: skip


# rows, input features, feed-forward size
GATED_LINEAR_SHAPES = [(0, 8, 16), (1, 1, 1), (3, 5, 7), (1, 64, 32), (15, 576, 48), (33, 70, 40), (300, 130, 80)]

# the same as LINEAR_SHAPES, of whole blocks
BLOCK_SHAPES = [(1, 32, 1), (2, 96, 33), (3, 416, 40), (17, 128, 70), (40, 160, 96), (200, 1600, 40)]

# bits, and whether there are minima
BLOCK_KINDS = {"8 bits": (8, False), "4 bits": (4, False), "4 bits with minima": (4, True)}


@dataclass(frozen=True)
class AttentionCase:
    """`sequences` are (tokens in this step, context length with them)."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    block_size: int = 4
    window: int | None = None
    soft_cap: float | None = None
    scale: float = 0.3


ATTENTION = {
    "one-token": AttentionCase(((1, 1),)),
    "one-decode": AttentionCase(((1, 9),)),
    "equal-decodes": AttentionCase(((1, 8), (1, 8), (1, 8))),
    "odd-decodes": AttentionCase(((1, 3), (1, 17), (1, 4), (1, 1), (1, 16))),
    "far-apart-decodes": AttentionCase(((1, 2), (1, 2600), (1, 5), (1, 2400), (1, 3)), block_size=16),
    "prompt": AttentionCase(((13, 13),)),
    "prompts": AttentionCase(((5, 5), (1, 1), (12, 12), (2, 2))),
    "chunk": AttentionCase(((6, 23),)),
    "mixed": AttentionCase(((1, 30), (7, 7), (1, 2), (9, 41), (1, 12), (3, 4))),
    "mixed-sizes": AttentionCase(
        ((1, 700), (30, 90), (1, 255), (70, 300), (2, 500), (1, 3)), head_size=20, block_size=16
    ),
    "long-chunk": AttentionCase(((300, 310), (1, 50), (129, 129)), block_size=16),
    "no-groups": AttentionCase(((4, 9), (1, 6)), heads=3, kv_heads=3),
    "one-kv-head": AttentionCase(((4, 9), (1, 6)), heads=5, kv_heads=1),
    "head-size-1": AttentionCase(((4, 9), (1, 6)), head_size=1),
    "head-size-96": AttentionCase(((4, 9), (1, 6)), head_size=96, heads=6),
    "head-size-12": AttentionCase(((4, 9), (1, 70), (1, 5)), head_size=12, heads=6),
    "head-size-64": AttentionCase(((70, 75), (1, 300)), head_size=64, heads=9, kv_heads=3, block_size=16),
    "head-size-80": AttentionCase(((20, 33), (1, 90)), head_size=80, heads=2, scale=0.1),
    "head-size-128": AttentionCase(((9, 40), (1, 90)), head_size=128, heads=7, kv_heads=1, scale=0.09),
    "head-size-256": AttentionCase(((9, 11), (1, 90)), head_size=256, heads=8, kv_heads=1, scale=0.06, soft_cap=50.0),
    "group-of-5": AttentionCase(((3, 60), (1, 61)), heads=10, head_size=16),
    "group-of-16": AttentionCase(((30, 70), (1, 61)), heads=16, kv_heads=1, head_size=16),
    "block-size-1": AttentionCase(((4, 9), (1, 6)), block_size=1),
    "block-size-7": AttentionCase(((4, 9), (1, 7), (1, 14), (1, 15)), block_size=7),
    "block-size-24": AttentionCase(((1, 130), (1, 600), (5, 70)), block_size=24, head_size=16),
    "block-size-100": AttentionCase(((1, 300), (1, 70), (1, 256), (9, 120)), block_size=100, head_size=16),
    "block-size-32": AttentionCase(((40, 90), (1, 64), (1, 65)), block_size=32),
    "pieces": AttentionCase(((1, 255), (1, 256), (1, 257), (1, 512), (1, 700)), block_size=16),
    "many-decodes": AttentionCase(tuple((1, 1 + 9 * i) for i in range(40)), heads=20, kv_heads=5, head_size=16),
    "many-padded": AttentionCase(tuple((1, 300 - 7 * i) for i in range(40)), heads=6, head_size=20, block_size=16),
    "long-context": AttentionCase(((1, 3000), (2, 2999)), heads=3, kv_heads=1, block_size=16, head_size=16),
    "window-pieces": AttentionCase(((1, 900), (3, 800)), window=300, block_size=16),
    "window-pieces-1": AttentionCase(((1, 900), (1, 270), (1, 5)), window=290, block_size=1),
    "window-pieces-100": AttentionCase(((1, 900), (1, 270), (1, 5)), window=290, block_size=100, head_size=16),
    "window-1": AttentionCase(((4, 9), (1, 6)), window=1),
    "window-inside-block": AttentionCase(((9, 30), (1, 17), (1, 2)), window=3),
    "window-decodes": AttentionCase(((1, 30), (1, 6), (1, 5), (1, 400)), window=6),
    "window-beyond-context": AttentionCase(((4, 9), (1, 6)), window=1000),
    "window-tiles": AttentionCase(((280, 300), (1, 90)), window=70, block_size=16),
    "soft-cap": AttentionCase(((4, 9), (1, 6), (1, 3)), soft_cap=0.8),
    "soft-cap-window": AttentionCase(((9, 22), (1, 60), (1, 3)), soft_cap=2.0, window=5, scale=1.5),
    "large-scores": AttentionCase(((4, 9), (1, 6)), scale=40.0),
}


NAMED_EDGES = (
    *((0, 16), (1, 1)),  # of NORM_SHAPES
    *((1, 1, 2, 1), (0, 2, 8, 4)),  # of ROPE_SHAPES
    *((1, 2), (0, 8)),  # of GATED_SHAPES
    *((1, 1, 1), (0, 4, 4), (0, 8, 16), (1, 32, 1)),  # of the linear ones
    *("one-token", "mixed", "head-size-1", "block-size-1", "window-1", "window-beyond-context", "soft-cap-window"),
    "large-scores",
)
"""Cases that a sample of a table keeps: nothing, one of everything, and the ends of what an op takes."""


def seeded(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear_inputs(shape, dtype, kept=None):
    """x, weight, bias of the order of 1 and a result of that order; weights that `kept` holds exactly."""
    rows, in_features, out_features = shape
    weight = seeded(out_features, in_features, seed=1, dtype=dtype) / in_features**0.5
    if kept is not None:
        weight = weight.to(kept).to(dtype)
    return seeded(rows, in_features, seed=0, dtype=dtype), weight, seeded(out_features, seed=2, dtype=dtype)


def pack_unrounded(pack, weight):
    """Return the matrix packed in the precision of its dtype; float64 has none, and stays as it is."""
    if weight.dtype == torch.float64:
        return DenseMatrix(weight)
    return pack(weight, Precision(str(weight.dtype).removeprefix("torch.")))


def make_blocks(in_features, out_features, bits, with_mins, seed=0):
    """All values there are, and scales of either sign, some of them subnormal."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 15) if with_mins else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = torch.randint(low, high + 1, (out_features, in_features), generator=generator, dtype=torch.int8)
    values[0, :2] = torch.tensor([low, high])
    scales = (torch.randn(out_features, in_features // BLOCK, generator=generator) * 0.05).half()
    scales[-1, -1] = 3e-7
    mins = torch.randn(scales.shape, generator=generator).half() if with_mins else None
    return BlockMatrix(values, scales, mins, bits)


def on_threads(count, call):
    """Return the result of `call` with this number of threads in torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def make_step(slots, tables, starts, lengths, prompts=None):
    """Return the inputs of a step, for its index; `prompts` default: sequences of more than one token."""
    starts = torch.as_tensor(starts)
    return StepInputs(
        tokens_T=slots,
        positions_T=slots,
        slots_T=slots,
        block_tables_SW=tables,
        query_starts_X=starts,
        lengths_S=torch.as_tensor(lengths),
        prompt_S=starts.diff() > 1 if prompts is None else torch.as_tensor(prompts),
        output_rows_N=slots,
        max_length=max(lengths),
    )


def attention_facts(q, *windows):
    """Return the facts that `prepare` needs of layers with queries like q and these windows, default none."""
    return AttentionFacts(q.shape[1], windows or (None,), q.dtype)
