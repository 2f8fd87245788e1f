"""A linear layer with its gated activation: what it computes, in every form that a weight is kept in."""

from __future__ import annotations

import math

import pytest
import torch
from batchinfer_kernels.formats import BlockMatrix, Precision

from tests.kernels.cases import GATED_LINEAR_SHAPES, NAMED_EDGES, TOLERANCE, linear_inputs, pack_unrounded, seeded

pytestmark = pytest.mark.usefixtures("variant")

_OPS = {"silu": lambda ops, x: ops.silu_mul(x), "gelu": lambda ops, x: ops.gelu_mul(x)}


def _inputs(shape, dtype=torch.float32):
    """x, the matrix of gates and factors, bias."""
    rows, in_features, size = shape
    return linear_inputs((rows, in_features, 2 * size), dtype)


def _skip_large(variant, shape):
    if variant == "triton" and shape[0] * shape[2] > 50_000:
        pytest.skip("takes seconds in the interpreter, and its blocks are those of smaller shapes")


def _forms(weight):
    """Name → what is multiplied with, and its weights in float32."""
    values = (weight.clamp(-1, 1) * 7).round().to(torch.int8)
    blocks = BlockMatrix(values, torch.full((len(weight), weight.shape[1] // 32), 0.125).half(), None, 4)
    narrow = weight.bfloat16().float()
    return {"float32": weight, "16 bits": narrow, "blocks": blocks}


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", GATED_LINEAR_SHAPES, ids=str)
def test_gated_linear_equals_linear_then_activation(ops, shape, dtype):
    x, weight, bias = _inputs(shape, dtype)
    packed = pack_unrounded(ops.pack_gated, weight)
    for given in (None, bias):
        sums = x.double() @ weight.double().T + (0 if given is None else given.double())
        gate, up = sums.chunk(2, dim=-1)
        gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        for name, expected in (("silu", gate / (1 + torch.exp(-gate)) * up), ("gelu", gelu * up)):
            got = ops.gated_linear(x, packed, given, name)
            assert got.dtype == dtype and got.shape == expected.shape
            # the sums are rounded, and the activation, before the product
            bound = 8 * TOLERANCE[dtype]
            torch.testing.assert_close(got.double(), expected, atol=bound, rtol=bound)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("form", ["float32", "16 bits", "blocks"])
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 96, 48), (5, 32, 512), (40, 160, 24), (300, 576, 1536)], ids=str)
def test_gated_linear_equals_its_two_ops_bit_for_bit(ops, variant, shape, form, activation):
    """Bit for bit, whether the panels come out even (F a multiple of 16) or not."""
    _skip_large(variant, shape)
    x, weight, bias = _inputs(shape)
    weight = _forms(weight)[form]
    for given in (None, bias):
        expected = _OPS[activation](ops, ops.linear(x, ops.pack(weight, Precision.FLOAT32), given))
        got = ops.gated_linear(x, ops.pack_gated(weight, Precision.FLOAT32), given, activation)
        assert torch.equal(got, expected) and got.std() > 0.01


@pytest.mark.sampled
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BFLOAT16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 101, 48), (40, 160, 24), (70, 576, 1536)], ids=str)
def test_rounded_gated_linear_equals_its_two_ops_bit_for_bit(ops, variant, shape, activation, precision):
    _skip_large(variant, shape)
    x, weight, bias = _inputs(shape)
    for given in (None, bias):
        expected = _OPS[activation](ops, ops.linear(x, ops.pack(weight, precision), given))
        assert torch.equal(ops.gated_linear(x, ops.pack_gated(weight, precision), given, activation), expected)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BFLOAT16])
def test_blocks_are_rounded_as_their_float32_numbers(ops, precision):
    _, weight, _ = _inputs((1, 64, 48))
    blocks = _forms(weight)["blocks"]
    x = seeded(3, 64, seed=3, dtype=torch.float32)
    one, other = (ops.gated_linear(x, ops.pack_gated(w, precision), None, "silu") for w in (blocks, blocks.float()))
    assert torch.equal(one, other)


def test_what_comes_out_goes_into_a_linear_layer_without_a_copy(ops, variant):
    """Its rows do not fall into the same lines of a cache; torch and other ops take them as they are."""
    x, weight, _ = _inputs((6, 64, 512))
    out = ops.gated_linear(x, ops.pack_gated(weight, Precision.FLOAT32), None, "silu")
    assert out.stride(0) == (512 if variant in ("eager", "triton") else 528)
    down = ops.pack(_inputs((1, 512, 20))[1], Precision.FLOAT32)
    assert torch.equal(ops.linear(out, down, None), ops.linear(out.contiguous(), down, None))
    normed = ops.rms_norm(out, torch.ones(512), 1e-5)
    assert normed.stride(0) == out.stride(0)
    assert torch.equal(normed, ops.rms_norm(out.contiguous(), torch.ones(512), 1e-5))


def test_stored_bytes_are_those_of_what_is_inside(ops):
    _, weight, _ = _inputs((1, 64, 32))
    gated, plain = (pack(weight, Precision.FLOAT32) for pack in (ops.pack_gated, ops.pack))
    assert gated.nbytes == plain.nbytes
