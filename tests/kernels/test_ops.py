"""Every op against a naive loop in float64, over the table of odd shapes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from batchinfer_kernels.contract import ScoreRule

from tests.kernels import naive
from tests.kernels.cases import (
    ATTENTION,
    GATED_SHAPES,
    NAMED_EDGES,
    NORM_SHAPES,
    ROPE_SHAPES,
    TOLERANCE,
    attention_facts,
    make_step,
)

pytestmark = pytest.mark.usefixtures("variant")

DTYPES = list(TOLERANCE)


def _random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _close(got, expected, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@functools.cache
def _expected_norm(shape, dtype, offset, with_residual):
    """Compute the naive result once for all backends, because it loops."""
    x = _random(*shape, dtype=dtype)
    if with_residual:
        x = x + _random(*shape, dtype=dtype, seed=2)
    return naive.rms_norm(x, _random(shape[-1], dtype=dtype, seed=1), 1e-5, offset)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_the_naive_loop(ops, shape, dtype, offset):
    x, weight = _random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype, seed=1)
    _close(ops.rms_norm(x, weight, 1e-5, offset), _expected_norm(shape, dtype, offset, False), dtype)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_add_rms_norm_changes_the_residual_and_not_x(ops, shape, dtype):
    x, residual = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype, seed=2)
    weight, x_before, total = _random(shape[-1], dtype=dtype, seed=1), x.clone(), x + residual
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    _close(got, _expected_norm(shape, dtype, 0.0, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_a_strided_view_equals_that_of_its_copy(ops, dtype):
    wide = _random(4, 3, 20, dtype=dtype)
    weight = _random(8, seed=1, dtype=dtype)
    _close(ops.rms_norm(wide[:, 1:, 4:12], weight, 1e-5), naive.rms_norm(wide[:, 1:, 4:12], weight, 1e-5), wide.dtype)


@functools.cache
def _turned(shape, dtype):
    """Return inputs with their angles, and the rotated result."""
    tokens, heads, size, pairs = shape
    whole = _random(tokens, heads + 2, size, dtype=dtype)  # a view of fused heads, as attention passes it
    angles = _random(tokens, pairs, seed=1) * 100
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    return whole, cos, sin, naive.rope(whole[:, 1 : 1 + heads], cos, sin)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rope_turns_in_place_and_leaves_the_rest(ops, shape, dtype):
    tokens, heads, size, pairs = shape
    before, cos, sin, turned = _turned(shape, dtype)
    whole, fused = before.clone(), before.clone()
    # keys of the same numbers, and the last head for values
    k, v, cache = fused[:, 1 : 1 + heads], fused[:, -1:].expand(-1, heads, -1), _room(tokens, heads, size, dtype)
    index = _one_sequence(ops, whole[:, 1 : 1 + heads], cache)
    ops.rope_kv_write(whole[:, 1 : 1 + heads], k, v, (cos, sin), cache, index)
    for each in (whole, fused):
        _close(each[:, 1 : 1 + heads], turned, dtype)
        assert torch.equal(each[:, 0], before[:, 0])
        assert torch.equal(each[:, -1], before[:, -1])
        assert torch.equal(each[..., 2 * pairs :], before[..., 2 * pairs :])
    for part, written in zip(cache.unbind(1), (k, v), strict=True):
        assert torch.equal(part.transpose(1, 2).flatten(0, 1)[:tokens], written)


def _room(tokens, heads, size, dtype):
    """Return an empty cache of blocks with 3 slots."""
    return torch.full((-(-tokens // 3), 2, heads, 3, size), torch.nan, dtype=dtype)


def _one_sequence(ops, q, cache):
    tokens = len(q)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    step = make_step(torch.arange(tokens), table, [0, tokens], [tokens])
    return ops.prepare(step, cache, attention_facts(q))


@functools.cache
def _gated(shape, dtype):
    gate, up = (_random(*shape, dtype=dtype) * 3).double().chunk(2, dim=-1)
    silu = gate / (1 + torch.exp(-gate)) * up
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    return silu, gelu


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
def test_gated_activations_equal_the_float64_loop(ops, shape, dtype):
    x = _random(*shape, dtype=dtype) * 3
    before = x.clone()
    silu, gelu = _gated(shape, dtype)
    # the activation is rounded before the product: twice the rounding of one result
    torch.testing.assert_close(ops.silu_mul(x).double(), silu, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    torch.testing.assert_close(ops.gelu_mul(x).double(), gelu, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    assert torch.equal(x, before)


class Batch:
    """A case's random tensors, its cache in shuffled blocks. Slots that hold no context hold NaN."""

    def __init__(self, case, dtype, cache_dtype=None):
        cache_dtype = cache_dtype or dtype
        needed = [-(-length // case.block_size) for _, length in case.sequences]
        blocks = sum(needed) + 2
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
        # entries beyond a sequence's blocks must not matter: point far outside
        self.tables = torch.full((len(needed), max(needed) + 1), 1 << 30, dtype=torch.int32)
        shape = (blocks, 2, case.kv_heads, case.block_size, case.head_size)
        self.cache = torch.full(shape, torch.nan, dtype=cache_dtype)
        self.starts, self.lengths, self.keys, self.values, slots = [0], [], [], [], []
        used = 0
        for s, (count, length) in enumerate(case.sequences):
            self.tables[s, : needed[s]] = order[used : used + needed[s]]
            used += needed[s]
            k = _random(length, case.kv_heads, case.head_size, dtype=dtype, seed=10 + s)
            v = _random(length, case.kv_heads, case.head_size, dtype=dtype, seed=90 + s)
            position = torch.arange(length)
            block, offset = self.tables[s].long()[position // case.block_size], position % case.block_size
            past = length - count
            self.cache[block[:past], 0, :, offset[:past]] = k[:past].to(cache_dtype)
            self.cache[block[:past], 1, :, offset[:past]] = v[:past].to(cache_dtype)
            slots.append((block * case.block_size + offset)[past:])
            self.keys.append(k)
            self.values.append(v)
            self.starts.append(self.starts[-1] + count)
            self.lengths.append(length)
        self.q = _random(self.starts[-1], case.heads, case.head_size, dtype=dtype, seed=5)
        self.slots = torch.cat(slots)
        self.case = case

    def new(self, context):
        """Return the keys or values of this step."""
        return torch.cat([c[len(c) - n :] for c, (n, _) in zip(context, self.case.sequences, strict=True)])

    def write(self, ops):
        step = make_step(self.slots, self.tables, self.starts, self.lengths)
        index = ops.prepare(step, self.cache, attention_facts(self.q, self.case.window))
        ops.rope_kv_write(self.q, self.new(self.keys), self.new(self.values), None, self.cache, index)
        return index

    def write_and_attend(self, ops, out=None):
        index = self.write(ops)
        rule = ScoreRule(self.case.scale, self.case.window, self.case.soft_cap)
        return ops.paged_attention(self.q, self.cache, index, rule, out)

    def expected(self):
        parts = []
        for s, (count, length) in enumerate(self.case.sequences):
            q = self.q[self.starts[s] : self.starts[s + 1]]
            keys, values = (x.to(self.cache.dtype).to(x.dtype) for x in (self.keys[s], self.values[s]))
            parts.append(naive.attention(q, keys, values, length - count, self.case))
        return torch.cat(parts)


@functools.cache
def _expected_attention(name, dtype, cache_dtype=None):
    return Batch(ATTENTION[name], dtype, cache_dtype).expected()


@pytest.mark.sampled(NAMED_EDGES)
# large scores times 16-bit rounding say nothing
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ATTENTION for dtype in DTYPES if name != "large-scores" or dtype.itemsize > 2],
    ids=str,
)
def test_paged_attention_equals_the_naive_loop(ops, name, dtype):
    _close(Batch(ATTENTION[name], dtype).write_and_attend(ops), _expected_attention(name, dtype), dtype)


@pytest.mark.sampled(NAMED_EDGES)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "large-scores"])
def test_paged_attention_over_a_16_bit_cache_equals_the_naive_loop(ops, name, cache_dtype):
    batch = Batch(ATTENTION[name], torch.float32, cache_dtype)
    _close(batch.write_and_attend(ops), _expected_attention(name, torch.float32, cache_dtype), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "equal-decodes"])
def test_paged_attention_writes_where_it_is_told(ops, name, dtype):
    expected = Batch(ATTENTION[name], dtype).write_and_attend(ops)
    out = torch.full_like(expected, float("nan"))
    assert Batch(ATTENTION[name], dtype).write_and_attend(ops, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["mixed", "block-size-7"])
def test_writing_changes_its_slots_alone(ops, name):
    batch = Batch(ATTENTION[name], torch.float32)
    before = batch.cache.clone()
    batch.write(ops)
    size = batch.case.block_size
    for tensor, old, context in zip(batch.cache.unbind(1), before.unbind(1), (batch.keys, batch.values), strict=True):
        for slot, row in zip(batch.slots.tolist(), batch.new(context), strict=True):
            assert torch.equal(tensor[slot // size, :, slot % size], row)
            old[slot // size, :, slot % size] = row
        assert torch.equal(tensor.nan_to_num(7.5), old.nan_to_num(7.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [list, lambda blocks: torch.tensor(blocks, dtype=torch.int32)])
def test_copied_blocks_are_what_their_sources_were(ops, dtype, numbers):
    """Also where a source is a target, of another copy or of its own, and where the tensors are not dense."""
    dense = [_random(7, 2, 2, 4, 8, dtype=dtype, seed=i) for i in range(3)]
    sparse = [_random(7, 2, 2, 4, 16, dtype=dtype)[..., ::2]]
    for caches in (dense, sparse):
        before = [cache.clone() for cache in caches]
        ops.copy_blocks(caches, numbers([0, 1, 3, 0, 6]), numbers([1, 2, 3, 4, 0]))
        for old, cache in zip(before, caches, strict=True):
            assert torch.equal(cache, old[[6, 0, 1, 3, 0, 5, 6]])
    for wrong in (7, 100):
        with pytest.raises(IndexError):
            ops.copy_blocks(dense, [0], [wrong])
