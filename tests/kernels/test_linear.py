"""Linear layers over packed weights: what they compute, in every form that a weight is kept in."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.formats import Precision

from tests.kernels.cases import LINEAR_SHAPES, NAMED_EDGES, TOLERANCE, linear_inputs, on_threads, pack_unrounded

pytestmark = pytest.mark.usefixtures("variant")


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_equals_float64_within_rounding(ops, shape, dtype):
    x, weight, bias = linear_inputs(shape, dtype)
    packed = pack_unrounded(ops.pack, weight)
    for given in (None, bias):
        expected = x.double() @ weight.double().T + (0 if given is None else given.double())
        got = ops.linear(x, packed, given)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 33), (40, 70, 33), (300, 1600, 70)], ids=str)
def test_weights_of_16_bits_change_no_bit(ops, shape, kept):
    """Packed in 16 bits where that is exact: the sums are those of the same weights in float32."""
    x, weight, bias = linear_inputs(shape, torch.float32, kept)
    whole = weight.clone()
    whole[-1, 0] += 2.0**-20  # one weight that 16 bits do not hold
    narrow, wide = (ops.linear(x, ops.pack(w, Precision.FLOAT32), bias)[:, :-1] for w in (weight, whole))
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_has_all_its_bits(ops, kept):
    """Also where an instruction set multiplies narrower numbers: against float64, and the sum of all sizes."""
    x, weight, _ = linear_inputs((40, 600, 96), torch.float32, kept)
    x *= 10.0 ** torch.linspace(-12, 12, 40)[:, None]
    weight *= 2.0 ** torch.arange(-48, 48)[:, None]
    got = ops.linear(x, ops.pack(weight, Precision.FLOAT32), None).double()
    missed = (got - x.double() @ weight.double().T).abs() / (x.double().abs() @ weight.double().abs().T)
    assert missed.max() < 2.0**-22 and missed.mean() < 2.0**-25


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e-33, 1e-35, 1e-38, 1e-42])
def test_the_smallest_numbers_leave_those_beside_them_alone(ops, size):
    """Where a float32 number is cut into parts, those of the smallest are not normal: of x, then of the weights."""
    x, weight, _ = linear_inputs((40, 64, 96), torch.float32)
    for some in (x[:, 1::2], weight[1::2]):
        some *= size
        got = ops.linear(x, ops.pack(weight, Precision.FLOAT32), None)
        torch.testing.assert_close(got.double(), x.double() @ weight.double().T, atol=2e-5, rtol=2e-5)


def test_16_bit_weights_take_half_the_memory(ops, variant):
    if variant in ("eager", "triton"):
        pytest.skip("keeps the matrix as it is")
    _, weight, _ = linear_inputs((1, 64, 64), torch.float32, torch.bfloat16)
    assert ops.pack(weight, Precision.FLOAT32).panels.dtype == torch.bfloat16
    assert ops.pack(weight + 2.0**-20, Precision.FLOAT32).panels.dtype == torch.float32
    assert ops.pack(torch.full((3, 8), 1 + 2.0**-10), Precision.FLOAT32).panels.dtype == torch.float16


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_a_row_s_result_depends_on_nothing_else(ops, variant, precision):
    """Not on the rows beside it, their number, nor the threads: tokens do not depend on the batch."""
    if variant in ("eager", "triton"):
        pytest.skip("torch promises nothing of the kind")
    for shape in ((300, 1600, 70), (64, 576, 200), (33, 512, 40), (61, 576, 96), (300, 1025, 70), (40, 2048, 33)):
        x, weight, bias = linear_inputs(shape, torch.float32)
        packed = ops.pack(weight, precision)
        together = ops.linear(x, packed, bias)
        for threads, rows in ((1, 1), (3, 13), (2, 29), (torch.get_num_threads(), 7)):
            for start in range(0, len(x), rows):
                part = slice(start, start + rows)
                got = on_threads(threads, lambda x=x[part], packed=packed, bias=bias: ops.linear(x, packed, bias))
                assert torch.equal(got, together[part])


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8])
def test_threads_do_all_of_the_work_however_many_they_are(ops, variant, precision):
    """Also where there are more of them than cores, so that some come when others have begun with their share."""
    if variant in ("triton", "cuda"):
        pytest.skip("no threads of the host work")
    x, weight, bias = linear_inputs((1500, 576, 200), torch.float32)
    packed = ops.pack(weight, precision)
    error = TOLERANCE[torch.float32]
    alone = on_threads(1, lambda: ops.linear(x, packed, bias))
    for threads in (2, 3, 5, 70) * 3:
        together, few = on_threads(threads, lambda: (ops.linear(x, packed, bias), ops.linear(x[:3], packed, bias)))
        torch.testing.assert_close(together, alone, atol=error, rtol=error)
        torch.testing.assert_close(few, alone[:3], atol=error, rtol=error)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, Precision.FLOAT16), (torch.bfloat16, Precision.FLOAT32), (torch.float16, Precision.FLOAT32)],
    ids=str,
)
def test_a_precision_that_nothing_is_rounded_to_is_refused(ops, dtype, precision):
    for pack in (ops.pack, ops.pack_gated):
        with pytest.raises(ValueError, match=f"is not rounded to {precision}"):
            pack(torch.zeros(32, 32, dtype=dtype), precision)


def test_rows_may_be_strided(ops, variant):
    x, weight, _ = linear_inputs((5, 40, 9), torch.float32)
    packed = ops.pack(weight, Precision.FLOAT32)
    wide = torch.zeros(5, 100)
    wide[:, 30:70] = x
    error = (
        TOLERANCE[torch.float32] if variant in ("eager", "triton") else 0
    )  # torch adds up in another order on some CPUs
    for strided in (wide[:, 30:70], x.T.contiguous().T):
        got, expected = (ops.linear(each, packed, None) for each in (strided, x))
        torch.testing.assert_close(got, expected, atol=error, rtol=error)


@pytest.mark.parametrize("kept", [None, torch.bfloat16, torch.float16], ids=str)
def test_packed_rows_are_the_matrix_s_rows(ops, kept):
    _, weight, _ = linear_inputs((1, 40, 70), torch.float32, kept)
    rows = torch.tensor([69, 0, 33, 33, 31, 32])
    assert torch.equal(ops.packed_rows(ops.pack(weight, Precision.FLOAT32), rows), weight[rows])


@pytest.mark.parametrize(
    ("precision", "features", "place"),
    [(Precision.FLOAT32, 64, 3), (Precision.INT8, 70, 69), (Precision.BFLOAT16, 71, 70)],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so_and_stay_in_their_row(ops, bad, precision, features, place):
    x, weight, bias = linear_inputs((20, features, 40), torch.float32)
    packed = ops.pack(weight, precision)
    calm = ops.linear(x, packed, bias)
    x[7, place] = bad
    got = ops.linear(x, packed, bias)
    assert not got[7].isfinite().any()
    others = [row for row in range(20) if row != 7]
    assert torch.equal(got[others], calm[others])


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_quantized_linear_equals_the_naive_loop(ops, shape, dtype):
    x, weight, bias = linear_inputs(shape, dtype)
    if shape[0] > 2:
        x[1] = 0
    scale = weight.float().abs().amax(1) / 127
    rounded = (weight.float() / scale[:, None]).round().double() * scale[:, None]
    expected = torch.zeros(shape[0], shape[2], dtype=torch.float64)
    for start in range(0, shape[1], 64):
        part = x[:, start : start + 64].float()
        largest = part.abs().amax(1).clamp(min=1e-20)[:, None]
        steps = (part * (torch.full_like(largest, 127) / largest)).round().double()
        expected += steps * (largest / 127) @ rounded[:, start : start + 64].T
    packed = ops.pack(weight, Precision.INT8)
    for given in (None, bias):
        got = ops.linear(x, packed, given)
        assert got.dtype == dtype
        wanted = expected if given is None else expected + given.double()
        torch.testing.assert_close(got.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_quantized_sums_are_exact_at_the_extremes(ops):
    """The largest products there are, of either sign: no step of an instruction set may saturate."""
    for sign in (1.0, -1.0):
        x, weight = torch.full((9, 2048), sign), torch.ones(70, 2048)
        weight[1::2] = -1.0
        got = ops.linear(x, ops.pack(weight, Precision.INT8), None)
        expected = (sign * 2048 * (1 - 2 * (torch.arange(70) % 2))).expand(9, 70)
        torch.testing.assert_close(got, expected.float(), atol=0, rtol=1e-6)


def test_a_quantized_row_s_result_depends_on_nothing_else(ops):
    x, weight, bias = linear_inputs((61, 576, 96), torch.float32)
    packed = ops.pack(weight, Precision.INT8)
    together = ops.linear(x, packed, bias)
    for start in range(0, 61, 7):
        assert torch.equal(ops.linear(x[start : start + 7], packed, bias), together[start : start + 7])


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_in_bfloat16_rounds_its_factors_and_nothing_else(ops, shape, dtype):
    """What is multiplied is rounded, and nothing else."""
    x, weight, bias = linear_inputs(shape, dtype)
    packed = ops.pack(weight, Precision.BFLOAT16)
    for given in (None, bias):
        expected = x.bfloat16().double() @ weight.bfloat16().double().T + (0 if given is None else given.double())
        got = ops.linear(x, packed, given)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even(ops):
    steps = torch.cat([1 + torch.arange(513) / 512 * 2.0**-5, torch.tensor([3.3e38, 1e-30, -1e-30, 65504.0])])
    numbers = torch.cat([steps, -steps])
    one = ops.pack(torch.eye(1), Precision.BFLOAT16)
    assert torch.equal(ops.linear(numbers[:, None], one, None)[:, 0], numbers.bfloat16().float())
    matrix = ops.pack(numbers[:, None].contiguous(), Precision.BFLOAT16)
    assert torch.equal(ops.linear(torch.ones(1, 1), matrix, None)[0], numbers.bfloat16().float())


@pytest.mark.parametrize("shape", [(1, 40, 70), (1, 41, 33), (1, 1, 1)], ids=str)
def test_rows_of_a_matrix_in_bfloat16_are_its_rounded_rows(ops, shape):
    _, weight, _ = linear_inputs(shape, torch.float32)
    rows = torch.arange(shape[2]).flip(0)
    packed = ops.pack(weight, Precision.BFLOAT16)
    assert torch.equal(ops.packed_rows(packed, rows), weight[rows].bfloat16().float())
