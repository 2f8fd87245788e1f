"""Attention on a device beyond the table of cases: drafts, 8-bit caches, long contexts, and bits of a row.

Without a GPU the checks themselves run on torch's ops.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.contract import ScoreRule
from torch import Tensor

from tests.gpu.rig import Rig, make_rig
from tests.kernels.cases import TOLERANCE, AttentionCase, attention_facts, make_step
from tests.kernels.on_device import OnDevice
from tests.kernels.test_ops import Batch


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def rig(request) -> Rig:
    return make_rig(request.param)


@pytest.fixture
def ops(rig) -> OnDevice:
    return OnDevice(rig.backend, rig.device.type)


def attend(ops: OnDevice, batch: Batch, step, q_THD: Tensor) -> Tensor:
    case = batch.case
    index = ops.prepare(step, batch.cache.to(ops.device), attention_facts(q_THD, case.window))
    return ops.paged_attention(q_THD, batch.cache, index, ScoreRule(case.scale, case.window, case.soft_cap))


def step_of(batch: Batch, **changes):
    return replace(make_step(batch.slots, batch.tables, batch.starts, batch.lengths), **changes)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


def equal(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_drafts_are_rows_of_a_decode(ops, dtype, window):
    sequences = (8, 300), (1, 40), (5, 5), (3, 257), (2, 900)
    case = AttentionCase(sequences, heads=12, kv_heads=2, head_size=64, block_size=16, window=window, scale=0.1)
    batch = Batch(case, dtype)
    batch.write(ops)
    none = torch.zeros(len(sequences), dtype=torch.bool)
    step = step_of(batch, prompt_S=none, has_prompts=False, max_queries=8)
    close(attend(ops, batch, step, batch.q), batch.expected())


@pytest.mark.parametrize("queries", [1, 20], ids=["decode", "prompt"])
def test_a_cache_of_float8_is_read_as_it_is(ops, queries):
    case = AttentionCase(((queries, 530), (1, 20)), heads=4, kv_heads=1, head_size=64, block_size=16, scale=0.1)
    batch = Batch(case, torch.bfloat16, torch.float8_e4m3fn)
    batch.write(ops)
    close(attend(ops, batch, step_of(batch), batch.q), batch.expected())


@pytest.mark.parametrize("lengths", [(4097, 16, 3000), (16384,)], ids=str)
def test_long_contexts(rig, ops, lengths):
    """Against the float64 loop for a few heads: many splits, of both sizes."""
    shorter = lengths if rig.is_gpu else tuple(length // 8 for length in lengths)
    case = AttentionCase(tuple((1, length) for length in shorter), heads=8, kv_heads=2, head_size=128, block_size=16)
    batch = Batch(replace(case, scale=0.09), torch.float16)
    batch.write(ops)
    close(attend(ops, batch, step_of(batch, has_prompts=False), batch.q), batch.expected())


def test_bits_depend_on_a_sequence_alone(rig, ops):
    """However many others are in the batch, and however a prompt is cut. Torch's ops are close, not equal."""
    same = equal if rig.is_gpu else close
    sequences = (1, 600), (90, 150), (1, 256), (1, 2000), (40, 40)
    case = AttentionCase(sequences, heads=6, kv_heads=2, head_size=64, block_size=16, scale=0.1)
    batch = Batch(case, torch.bfloat16)
    batch.write(ops)
    together = attend(ops, batch, step_of(batch), batch.q)
    for s, (count, length) in enumerate(sequences):
        rows = slice(batch.starts[s], batch.starts[s] + count)
        cuts = {count, max(1, count - 37)}
        for cut in cuts:
            own = slice(rows.stop - cut, rows.stop)
            table = batch.tables[s : s + 1]
            alone = make_step(batch.slots[own], table, [0, cut], [length], prompts=[count > 1])
            same(attend(ops, batch, alone, batch.q[own]), together[own])
