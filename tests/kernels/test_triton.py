"""Triton kernels beyond the ops' meaning: memory accesses, formats of 8 bits, padding, strides, launches."""

from __future__ import annotations

import math

import pytest
import torch
from batchinfer_kernels.triton.targets import TARGETS

pytest.importorskip("triton")

from batchinfer_kernels.triton import rope_kv_write as rope

from tests.kernels import naive
from tests.kernels.access_checker import checked_accesses
from tests.kernels.cases import TOLERANCE, attention_facts, make_step, seeded

NARROW = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn


def _heads(tokens, heads, kv_heads, size, dtype=torch.bfloat16):
    """Return q, k, v as views of one fused projection."""
    fused = seeded(tokens, heads + 2 * kv_heads, size, seed=3, dtype=dtype)
    return fused.split([heads, kv_heads, kv_heads], dim=1)


def _angles(tokens, pairs):
    angles = seeded(tokens, pairs, seed=4) * 50
    return angles.cos().float(), angles.sin().float()


def _cache(blocks, kv_heads, block_size, size, dtype=torch.bfloat16):
    return torch.full((blocks, 2, kv_heads, block_size, size), torch.nan).to(dtype)


def _index(ops, q, cache, slots):
    table = torch.zeros(1, 1, dtype=torch.int32)
    return ops.prepare(make_step(slots, table, [0, len(q)], [len(q)]), cache, attention_facts(q))


def _written(cache, slots):
    """Return keys and values [T, K, D] of the slots."""
    size = cache.shape[3]
    return [cache[slots // size, part, :, slots % size] for part in (0, 1)]


@pytest.mark.parametrize("name", ["eager", "interpreted"])
@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8], ids=str)
@pytest.mark.parametrize(("shape", "added"), [((1, 1), False), ((3, 40), True), ((5, 576), False), ((0, 8), True)])
def test_rms_norm_quantized_is_the_norm_within_its_steps(request, name, dtype, shape, added):
    ops = request.getfixturevalue(name)
    x, weight = seeded(*shape, seed=1, dtype=torch.bfloat16), seeded(shape[1], seed=2, dtype=torch.bfloat16)
    if len(x) > 1:
        x[1] = 0
    residual = torch.zeros_like(x) if added else None
    values, scales = ops.rms_norm_quantized(x, residual, weight, 1e-5, 1.0, dtype)
    assert (values.dtype, scales.dtype, scales.shape) == (dtype, torch.float32, shape[:1])
    assert residual is None or torch.equal(residual, x)
    norm = naive.rms_norm(x, weight, 1e-5, 1.0)
    got = values.double() * scales.double()[:, None]
    if dtype == torch.int8:
        assert ((got - norm).abs() <= 0.5001 * scales.double()[:, None]).all()
    else:  # 3 bits of mantissa; below 2^-6 steps of 2^-9
        assert ((got - norm).abs() <= norm.abs() * 2.0**-4 * 1.0001 + 2.0**-10 * scales.double()[:, None]).all()
    peaks = values.float().abs().amax(-1)
    assert torch.equal(peaks, torch.where(x.abs().amax(-1) > 0, 127.0 if dtype == torch.int8 else 448.0, 0.0))


@pytest.mark.parametrize("dtype", [FLOAT8, torch.int8], ids=str)
def test_quantized_norms_of_both_backends_are_equal(eager, interpreted, dtype):
    x, weight = seeded(6, 200, seed=1, dtype=torch.float32), seeded(200, seed=2, dtype=torch.float32)
    (one, scales), (other, others) = (
        b.rms_norm_quantized(x, None, weight, 1e-5, 0.0, dtype) for b in (eager, interpreted)
    )
    torch.testing.assert_close(scales, others, rtol=1e-6, atol=0)
    different = one.float() != other.float()  # by a step, where a number lies between two
    assert different.float().mean() < 0.01


class TestCacheFormats:
    NUMBERS = torch.tensor([0.0, 1e-3, 0.002, 0.0146, 0.0157, 0.9, 1.0625, 1.1875, 17.5, 447.0, 464.0, 500.0, 1e9])

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @pytest.mark.parametrize("name", ["eager", "interpreted", "bits"])
    def test_float8_rounds_to_nearest_even_and_saturates(self, request, monkeypatch, name, dtype):
        """`bits`: as where the GPU does not convert the format."""
        if name == "bits":
            monkeypatch.setattr(rope, "target_of", lambda device: TARGETS["sm_80"])
        ops = request.getfixturevalue("eager" if name == "eager" else "interpreted")
        numbers = torch.cat([self.NUMBERS, -self.NUMBERS, torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0**-10])])
        random = seeded(226, seed=1) * 2.0 ** torch.linspace(-12, 9, 226)
        v = torch.cat([numbers.double(), random]).to(dtype).view(4, 1, 64)
        cache, slots = _cache(2, 1, 4, 64, FLOAT8), torch.tensor([5, 0, 3, 6])
        ops.rope_kv_write(v.clone(), v.clone(), v, None, cache, _index(ops, v, cache, slots))
        expected = v.float().clamp(-448, 448).to(FLOAT8)
        for written in _written(cache.float(), slots):
            assert torch.equal(written.nan_to_num(7.7), expected.float().nan_to_num(7.7))

    @pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16, FLOAT8], ids=str)
    def test_keys_are_rotated_then_rounded(self, interpreted, cache_dtype):
        q, k, v = _heads(5, 3, 2, 20)
        cos, sin = _angles(5, 6)
        turned = naive.rope(k, cos, sin).to(k.dtype)
        cache, slots = _cache(3, 2, 4, 20, cache_dtype), torch.tensor([11, 0, 5, 6, 2])
        before = v.clone()
        interpreted.rope_kv_write(q, k, v, (cos, sin), cache, _index(interpreted, q, cache, slots))
        torch.testing.assert_close(k, turned, atol=0.02, rtol=0.01)
        assert torch.equal(v, before)
        for written, given in zip(_written(cache.float(), slots), (k, v), strict=True):
            assert torch.equal(written, given.to(cache_dtype).float())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pairs", [0, 3, 8])
def test_padding_tokens_in_slot_minus_one_change_nothing(interpreted, index_dtype, pairs):
    """Their hidden states are NaN, and so are their angles."""
    padded = [x.clone() for x in _heads(7, 3, 2, 16, torch.float32)]
    slots = torch.tensor([4, 1, -1, 6, 0, -1, -1], dtype=index_dtype)
    cos_sin = _angles(7, pairs) if pairs else None
    for each in (*padded, *(cos_sin or ())):
        each[slots < 0] = torch.nan
    real = [x[slots >= 0] for x in padded]
    caches = [_cache(2, 2, 4, 16, torch.float32) for _ in range(2)]
    for (q, k, v), cache, kept in ((padded, caches[0], slots >= -1), (real, caches[1], slots >= 0)):
        angles = None if cos_sin is None else tuple(x[kept] for x in cos_sin)
        interpreted.rope_kv_write(q, k, v, angles, cache, _index(interpreted, q, cache, slots[kept]))
    assert torch.equal(*(cache.nan_to_num(7.7) for cache in caches))
    for one, other in zip(padded, real, strict=True):
        assert torch.equal(one[slots >= 0], other)


def test_padding_rows_change_no_other_row_of_norms_and_activations(interpreted):
    x, weight = seeded(9, 48, seed=1, dtype=torch.bfloat16), seeded(48, seed=2, dtype=torch.bfloat16)
    poisoned = x.clone()
    poisoned[5:] = torch.nan
    for run in (
        lambda x: interpreted.rms_norm(x, weight, 1e-5),
        lambda x: interpreted.add_rms_norm(x, x.clone(), weight, 1e-5),
        lambda x: interpreted.rms_norm_quantized(x, None, weight, 1e-5, 0.0, torch.int8)[0],
        interpreted.silu_mul,
        interpreted.gelu_mul,
    ):
        assert torch.equal(run(poisoned)[:5], run(x)[:5])
        assert torch.equal(run(x[:5]), run(x)[:5])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_are_free(interpreted, axis):
    """Every axis of q, k and v in turn has numbers of others in between."""
    q, k, v = _heads(5, 3, 2, 12, torch.float32)
    wide = [x.repeat_interleave(2, axis) for x in (q, k, v)]
    strided = [x[tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(3))] for x in wide]
    others = [x[tuple(slice(1, None, 2) if i == axis else slice(None) for i in range(3))].clone() for x in wide]
    caches = [_cache(2, 2, 4, 12, torch.float32) for _ in range(2)]
    slots = torch.tensor([7, 1, 2, 0, 5])
    for (x, y, z), cache in (((q, k, v), caches[0]), (strided, caches[1])):
        interpreted.rope_kv_write(x, y, z, _angles(5, 6), cache, _index(interpreted, x, cache, slots))
    assert torch.equal(*(cache.nan_to_num(7.7) for cache in caches))
    for got, expected in zip(strided, (q, k, v), strict=True):
        assert torch.equal(got, expected)
    untouched = [x[tuple(slice(1, None, 2) if i == axis else slice(None) for i in range(3))] for x in wide]
    assert all(torch.equal(one, other) for one, other in zip(untouched, others, strict=True))


class TestAccesses:
    """No access out of bounds, no race, and no byte of a step's data moved twice."""

    @pytest.mark.parametrize("shape", [(3, 576), (40, 33), (2, 5, 20)], ids=str)
    @pytest.mark.parametrize("added", [False, True])
    def test_norms(self, interpreted, shape, added):
        x, weight = seeded(*shape, seed=1, dtype=torch.bfloat16), seeded(shape[-1], seed=2, dtype=torch.bfloat16)
        with checked_accesses() as launches:
            if added:
                interpreted.add_rms_norm(x, x.clone(), weight, 1e-5)
            else:
                interpreted.rms_norm(x, weight, 1e-5)
        (launch,) = launches
        # weights are read by every program, and stay in the GPU's caches
        assert launch.loaded_bytes - launch.loaded_from["weight_E"] == (1 + added) * x.nbytes
        assert launch.stored_bytes == (1 + added) * x.nbytes
        assert launch.loaded_from["weight_E"] <= weight.nbytes * math.ceil(x.numel() / 1024)

    def test_quantized_norms(self, interpreted):
        x, weight = seeded(7, 100, seed=1, dtype=torch.bfloat16), seeded(100, seed=2, dtype=torch.bfloat16)
        with checked_accesses() as launches:
            interpreted.rms_norm_quantized(x, x.clone(), weight, 1e-5, 0.0, torch.int8)
        assert launches[0].loaded_bytes == 2 * x.nbytes + weight.nbytes
        assert launches[0].stored_bytes == x.nbytes + x.numel() + 7 * 4

    @pytest.mark.parametrize("shape", [(3, 96), (17, 10), (2, 3, 8)], ids=str)
    def test_activations(self, interpreted, shape):
        x = seeded(*shape, seed=1, dtype=torch.float16)
        with checked_accesses() as launches:
            interpreted.silu_mul(x)
            interpreted.gelu_mul(x)
        assert [(one.loaded_bytes, one.stored_bytes) for one in launches] == [(x.nbytes, x.nbytes // 2)] * 2

    @pytest.mark.parametrize("pairs", [0, 20, 32])
    def test_rope_and_kv_write(self, interpreted, pairs):
        q, k, v = _heads(33, 12, 3, 64)
        cache, slots = _cache(5, 3, 8, 64), torch.arange(33, dtype=torch.int32)
        slots[3::9] = -1
        index, angles = _index(interpreted, q, cache, slots), _angles(33, pairs) if pairs else None
        with checked_accesses() as launches:
            interpreted.rope_kv_write(q, k, v, angles, cache, index)
        (launch,) = launches
        row, written = 64 * 2 * 3, int((slots >= 0).sum())
        moved = 2 * pairs / 64  # of queries and keys
        loaded = (q.numel() + k.numel()) * 2 * moved + written * row * (2 - moved) + 33 * (2 * pairs + 1) * 4
        stored = (q.numel() + k.numel()) * 2 * moved + 2 * written * row
        assert launch.stored_bytes == stored
        assert loaded <= launch.loaded_bytes  # angles are read for every 32 heads
        assert launch.loaded_bytes + stored <= 1.1 * (loaded + stored)

    def test_copies_of_all_layers_are_one_launch(self, interpreted):
        caches = interpreted.allocate_kv((7, 2, 2, 4, 8), 3, torch.bfloat16).layers
        for layer, cache in enumerate(caches):
            cache.copy_(seeded(*cache.shape, seed=layer))
        before = [cache.clone() for cache in caches]
        with checked_accesses() as launches:
            interpreted.copy_blocks(caches, [0, 1, 0], [4, 5, 6])
        (launch,) = launches
        assert launch.stored_bytes == 3 * 3 * caches[0][0].nbytes
        assert launch.loaded_bytes - launch.loaded_from["from_C"] - launch.loaded_from["to_C"] == launch.stored_bytes
        for old, cache in zip(before, caches, strict=True):
            assert torch.equal(cache, old[[0, 1, 2, 3, 0, 1, 0]])

    @pytest.mark.parametrize("size", [1, 3, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8], ids=str)
    def test_copies_in_turn_of_odd_blocks(self, interpreted, dtype, size):
        caches = [seeded(5, 2, 1, 1, size, seed=i).to(dtype) for i in range(2)]
        before = [cache.clone() for cache in caches]
        with checked_accesses():
            interpreted.copy_blocks(caches, [0, 1, 2], [1, 2, 0])
        for old, cache in zip(before, caches, strict=True):
            assert torch.equal(cache.float(), old[[2, 0, 1, 3, 4]].float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_norm_after_an_addition_is_that_of_the_residual_as_it_is_stored(interpreted, dtype):
    x, residual, weight = (seeded(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(5, 40), (5, 40), (40,)]))
    got = interpreted.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(got, interpreted.rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_row_s_norm_depends_on_nothing_else(interpreted, dtype):
    x, weight = seeded(21, 100, seed=1, dtype=dtype), seeded(100, seed=2, dtype=dtype)
    together = interpreted.rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.cat([interpreted.rms_norm(row[None], weight, 1e-5) for row in x[:5]]), together[:5])
    torch.testing.assert_close(together.double(), naive.rms_norm(x, weight, 1e-5), atol=TOLERANCE[dtype], rtol=0)
