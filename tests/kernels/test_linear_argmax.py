"""The largest output feature of a linear layer, found by bounds: what a look at all of them finds, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from batchinfer_kernels.cpu.linear_argmax import make_bounds
from batchinfer_kernels.formats import Precision

from tests.kernels.cases import (
    BLOCK_KINDS,
    BLOCK_SHAPES,
    LINEAR_SHAPES,
    NAMED_EDGES,
    linear_inputs,
    make_blocks,
    on_threads,
)

pytestmark = pytest.mark.usefixtures("compiled")


def check(ops, x, weight):
    """Against all output features; NumPy takes the first of equals, and a NaN before all numbers."""
    packed = ops.pack(weight, Precision.FLOAT32)
    whole = ops.linear(x, packed, None).numpy()
    ids = torch.from_numpy(np.argmax(whole, axis=1))
    got_values, got_ids = ops.linear_argmax(x, make_bounds(packed))
    assert torch.equal(got_ids, ids)
    assert got_values.numpy().tobytes() == np.take_along_axis(whole, ids.numpy()[:, None], 1)[:, 0].tobytes()


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_argmax_equals_the_argmax_of_linear(ops, shape, kept):
    x, weight, _ = linear_inputs(shape, torch.float32, kept)
    check(ops, x, weight)
    check(ops, x * 1e-12, weight)
    check(ops, x * 1e9, weight * 1e-7)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_linear_argmax_of_blocks_equals_the_argmax_of_linear(ops, shape, kind):
    rows, in_features, out_features = shape
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1))
    check(ops, x, make_blocks(in_features, out_features, *BLOCK_KINDS[kind]))


@pytest.mark.parametrize("rows", [1, 13, 40])
def test_linear_argmax_tells_apart_what_rounding_cannot(ops, rows):
    """Equal output features, of which the first is meant; and such as differ by less than bfloat16 knows."""
    x, weight, _ = linear_inputs((rows, 200, 300), torch.float32)
    equal = weight[:1].expand(300, -1).contiguous()
    check(ops, x, equal)
    check(ops, x, equal + 1e-5 * weight)
    check(ops, x, weight.repeat_interleave(3, 0)[:300])
    check(ops, torch.zeros_like(x), weight)
    check(ops, x, torch.zeros_like(weight))


def test_rows_far_longer_than_others_change_nothing(ops):
    x, weight, _ = linear_inputs((30, 64, 500), torch.float32)
    x[:, 3] *= 1e4
    x[::2] *= 1e-6
    weight[::7] *= 1e3
    weight[1::7] *= 1e-3
    check(ops, x, weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_row_that_is_not_finite_is_looked_at_whole(ops, bad):
    x, weight, _ = linear_inputs((9, 64, 500), torch.float32)
    x[4, 7] = bad
    check(ops, x, weight)


def test_a_row_s_result_depends_on_nothing_else(ops):
    x, weight, _ = linear_inputs((61, 576, 3000), torch.float32)
    bounds = make_bounds(ops.pack(weight, Precision.FLOAT32))
    values, ids = ops.linear_argmax(x, bounds)
    for threads, rows in ((1, 1), (3, 13), (2, 29)):
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            got = on_threads(threads, lambda part=part: ops.linear_argmax(x[part], bounds))
            assert torch.equal(got[0], values[part]) and torch.equal(got[1], ids[part])


def test_rows_may_be_strided(ops):
    x, weight, _ = linear_inputs((5, 40, 90), torch.float32)
    wide = torch.zeros(5, 100)
    wide[:, 30:70] = x
    for strided in (wide[:, 30:70], x.T.contiguous().T):
        check(ops, strided, weight)


def test_matrices_without_bounds_have_no_argmax_bounds(ops, variant):
    """For weights that are not finite or huge, for rounded ones, and where rounding makes products no faster."""
    _, weight, _ = linear_inputs((1, 64, 70), torch.float32)
    for bad in (math.nan, math.inf, 1e30):
        broken = weight.clone()
        broken[69, 63] = bad
        assert make_bounds(ops.pack(broken, Precision.FLOAT32)) is None
    has_bounds = ops.argmax_bounds(ops.pack(weight, Precision.FLOAT32)) is not None
    assert has_bounds == (variant in ("amx", "avx512_bf16"))
    for rounded in (weight, ops.pack(weight, Precision.INT8), ops.pack(weight, Precision.BFLOAT16)):
        assert ops.argmax_bounds(rounded) is None
