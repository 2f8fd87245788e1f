"""Weights in blocks of 4 and 8 bits: every result is that of the float32 numbers that they stand for, bit for bit."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.formats import BLOCK, Precision, stacked_blocks

from tests.kernels.cases import BLOCK_KINDS, BLOCK_SHAPES, NAMED_EDGES, make_blocks

pytestmark = pytest.mark.usefixtures("variant")


@pytest.fixture(params=BLOCK_KINDS)
def kind(request):
    return BLOCK_KINDS[request.param]


def _exact_in_float32(matrix):
    """Compute `float` in float64; a row that 16 bits do not hold keeps the panels of it float32."""
    scales = matrix.scales_OG.double().repeat_interleave(BLOCK, 1)
    weights = matrix.values_OI.double() * scales
    if matrix.mins_OG is not None:
        weights += matrix.mins_OG.double().repeat_interleave(BLOCK, 1)
    return weights.float()


def test_float_is_value_times_scale_plus_minimum(kind):
    matrix = make_blocks(96, 33, *kind)
    assert torch.equal(matrix.float(), _exact_in_float32(matrix))


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_blocks_change_no_bit(ops, shape, kind):
    rows, in_features, out_features = shape
    matrix = make_blocks(in_features, out_features, *kind)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(rows, in_features, generator=generator), torch.randn(out_features, generator=generator)
    blocks, floats = (ops.pack(one, Precision.FLOAT32) for one in (matrix, _exact_in_float32(matrix)))
    for given in (None, bias):
        for count in {n for n in (1, 2, 3, 4, rows // 2, rows) if n <= rows}:
            got = ops.linear(x[:count], blocks, given)
            assert torch.equal(got, ops.linear(x[:count], floats, given))
            assert got.isfinite().all() and (got.numel() < 9 or got.std() > 0.1)


@pytest.mark.parametrize("in_features", [512, 1024])
def test_rows_that_share_cache_sets_change_no_result(ops, in_features, kind):
    matrix = make_blocks(in_features, 40, *kind)
    x = torch.randn(9, 2 * in_features, generator=torch.Generator().manual_seed(1))[:, in_features:]
    got = ops.linear(x, ops.pack(matrix, Precision.FLOAT32), None)
    assert torch.equal(got, ops.linear(x, ops.pack(_exact_in_float32(matrix), Precision.FLOAT32), None))


def test_packed_rows_are_the_matrix_s_rows(ops, kind):
    matrix = make_blocks(160, 70, *kind)
    rows = torch.tensor([69, 0, 33, 33, 31, 32, 7, 8, 3, 4, 15, 16])
    packed = ops.pack(matrix, Precision.FLOAT32)
    assert torch.equal(ops.packed_rows(packed, rows), _exact_in_float32(matrix)[rows])
    assert ops.packed_rows(packed, rows[:0]).shape == (0, 160)
    with pytest.raises(IndexError):
        ops.packed_rows(packed, torch.tensor([-71]) if isinstance(packed, torch.Tensor) else torch.tensor([96 + 70]))


def test_blocks_take_their_bits_and_those_of_scales(ops, variant, kind):
    if variant in ("eager", "triton"):
        pytest.skip("keeps the matrix in float32")
    bits, with_mins = kind
    stored = ops.pack(make_blocks(320, 96, *kind), Precision.FLOAT32).nbytes
    assert stored == 320 * 96 * (bits + 16 * (1 + with_mins) / BLOCK) / 8


def test_matrices_of_one_kind_are_stacked():
    for kind in BLOCK_KINDS.values():
        parts = [make_blocks(64, rows, *kind, seed=rows) for rows in (3, 40, 1)]
        whole = stacked_blocks(parts)
        assert torch.equal(whole.float(), torch.cat([part.float() for part in parts]))
    different = [make_blocks(64, 3, *kind) for kind in BLOCK_KINDS.values()]
    for a, b in ((0, 1), (1, 2), (2, 1), (0, 2)):
        assert stacked_blocks([different[a], different[b]]) is None
