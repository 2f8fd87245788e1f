"""Attention in Triton beyond the table of cases: drafts, splits, 8-bit keys, static buffers, and memory accesses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batchinfer_kernels.contract import ScoreRule

from tests.kernels.cases import TOLERANCE, AttentionCase, attention_facts, make_step

pytest.importorskip("triton")

from batchinfer_kernels.triton import paged_attention as wrapper
from batchinfer_kernels.triton.paged_attention import paged_attention
from batchinfer_kernels.triton.step_index import prepare
from batchinfer_kernels.triton.targets import TARGETS
from triton.runtime import interpreter

from tests.kernels.access_checker import checked_accesses
from tests.kernels.conftest import make_interpreted_backend
from tests.kernels.test_ops import Batch

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def backend():
    return make_interpreted_backend()


@pytest.fixture
def rows_apart(monkeypatch):
    """Let a row of a product depend on no other row, as on tensor cores: NumPy's BLAS rounds rows by their place."""

    def product(self, left, right, total, input_precision, max_num_imprecise_acc):
        numbers = left.data.astype(np.float64) @ right.data.astype(np.float64) + total.data
        return interpreter.TensorHandle(numbers.astype(np.float32), total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


def filled(backend, case, dtype=torch.float32, cache_dtype=None):
    """Return a case's batch, with all keys and values in its cache."""
    batch = Batch(case, dtype, cache_dtype)
    batch.write(backend)
    return batch


def step_of(batch, **changes):
    return replace(make_step(batch.slots, batch.tables, batch.starts, batch.lengths), **changes)


def drafts(batch, **changes):
    """Return a step whose sequences are all decodes."""
    none = torch.zeros(len(batch.lengths), dtype=torch.bool)
    return step_of(batch, prompt_S=none, has_prompts=False, max_queries=8, **changes)


def attend(batch, step, q=None):
    q = batch.q if q is None else q
    case = batch.case
    index = prepare(step, batch.cache, attention_facts(q, case.window))
    out = torch.full_like(q, torch.nan)
    return paged_attention(q, batch.cache, index, ScoreRule(case.scale, case.window, case.soft_cap), out)


def close(got, expected):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("queries", range(1, 9))
def test_up_to_eight_queries_are_rows_of_a_decode(backend, queries):
    sequences = (queries, 256 + (queries + 1) // 2), (1, 40), (queries, queries)
    window = 100 if queries % 3 else None
    cap = 3.0 if queries % 2 else None
    case = AttentionCase(sequences, heads=5, kv_heads=1, head_size=12, block_size=24, window=window, soft_cap=cap)
    batch = filled(backend, case)
    with checked_accesses() as launches:
        close(attend(batch, drafts(batch)), batch.expected())
    assert [launch.kernel for launch in launches] == ["decode_attention_kernel", "merge_splits_kernel"]


def test_more_rows_than_a_program_holds_are_further_programs(backend):
    batch = filled(backend, AttentionCase(((8, 30), (3, 70)), heads=9, kv_heads=1, head_size=16))
    with checked_accesses():
        close(attend(batch, drafts(batch)), batch.expected())


@pytest.mark.parametrize(("window", "block_size"), [(None, 16), (270, 24)])
def test_bits_of_a_decode_depend_on_its_sequence_alone(backend, rows_apart, window, block_size, monkeypatch):
    """However many splits the grid has, how many a program computes, and whoever else is in the batch."""
    sequences = (1, 600), (1, 256), (1, 257)
    case = AttentionCase(sequences, heads=3, kv_heads=1, head_size=16, block_size=block_size, window=window)
    batch = filled(backend, case)
    together = attend(batch, step_of(batch, has_prompts=False))
    close(together, batch.expected())
    for s, length in enumerate(batch.lengths):
        alone = make_step(batch.slots[s : s + 1], batch.tables[s : s + 1], [0, 1], [length])
        alone = replace(alone, has_prompts=False)
        assert torch.equal(attend(batch, alone, batch.q[s : s + 1]), together[s : s + 1])
    for programs in (1, 2 * len(batch.lengths)):
        monkeypatch.setattr(wrapper, "PROGRAMS", programs)
        assert torch.equal(attend(batch, step_of(batch, has_prompts=False)), together)


def test_bits_of_a_query_do_not_depend_on_the_draft_before_it(backend, rows_apart):
    """Of one family: a step of up to eight queries, whose programs have as many rows for one as for eight."""
    batch = filled(backend, AttentionCase(((6, 515),), heads=2, kv_heads=1, window=258, block_size=16))
    together = attend(batch, drafts(batch))
    close(together, batch.expected())
    for cut in (1, 3):
        last = replace(drafts(batch), query_starts_X=torch.tensor([0, cut]))
        assert torch.equal(attend(batch, last, batch.q[-cut:]), together[-cut:])


def test_bits_of_a_prompt_do_not_depend_on_its_chunks(backend, rows_apart):
    batch = filled(backend, AttentionCase(((90, 150),), heads=5, kv_heads=1, block_size=16))
    whole = attend(batch, step_of(batch))
    for cut in (1, 37):  # one token of a prompt is no decode
        chunk = make_step(batch.slots[-cut:], batch.tables, [0, cut], batch.lengths, prompts=[True])
        assert torch.equal(attend(batch, chunk, batch.q[-cut:]), whole[-cut:])


def test_split_size_follows_the_tables_and_the_cache_alone():
    def split(blocks, dtype=torch.bfloat16, longest=100):
        table = torch.zeros(2, blocks, dtype=torch.int32)
        step = replace(make_step(torch.arange(2), table, [0, 1, 2], [7, 9]), max_length=longest)
        index = prepare(step, torch.empty(3, 2, 1, 16, 8, dtype=dtype), attention_facts(torch.empty(2, 1, 8)))
        return index.split_tokens, index.num_splits

    assert split(256) == split(1024) == (256, 1)
    assert split(1024, longest=4096) == (256, 16)
    assert split(2560, longest=4096) == (1024, 4)
    assert split(8192, longest=131072) == (2048, 64)
    assert split(256, FLOAT8, longest=4096) == (512, 8)


@pytest.mark.parametrize("queries", [1, 6], ids=["decode", "prompt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_keys_and_values(backend, dtype, queries, monkeypatch):
    """In float8's own type and, where a GPU has none, as bits: the numbers are the same."""
    case = AttentionCase(((queries, 530), (1, 20)), head_size=20, block_size=16)
    batch = filled(backend, case, dtype, FLOAT8)
    got = attend(batch, step_of(batch))
    close(got, batch.expected())
    monkeypatch.setattr(wrapper, "target_of", lambda device: TARGETS["sm_80"])
    assert torch.equal(attend(batch, step_of(batch)), got)


def test_every_float8_number_is_read_as_it_is(backend, monkeypatch):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(FLOAT8)  # without NaN
    batch = filled(backend, AttentionCase(((1, 1),), heads=1, kv_heads=1, head_size=254), torch.float32, FLOAT8)
    batch.cache[batch.tables[0, 0], 1, 0, 0] = codes
    for target in ("sm_80", "sm_90"):
        monkeypatch.setattr(wrapper, "target_of", lambda device, target=target: TARGETS[target])
        assert torch.equal(attend(batch, step_of(batch))[0, 0], codes.float())


MIXED = AttentionCase(((1, 260), (3, 9), (1, 1), (5, 20)), heads=3, kv_heads=1, head_size=20, block_size=7)


@pytest.mark.parametrize(("max_queries", "index_dtype"), [(1, torch.int32), (4, torch.int64)], ids=str)
def test_padding_of_static_buffers_changes_nothing(backend, max_queries, index_dtype):
    """Sequences without tokens at a dummy seat, tokens of no sequence, tables by seat, garbage in unused entries."""
    batch = filled(backend, MIXED)
    plain = step_of(batch, max_queries=max_queries, prompt_S=torch.tensor([False, False, False, True]))
    expected = attend(batch, plain)
    close(expected, batch.expected())
    tokens, seats = len(batch.q), torch.tensor([5, 0, 3, 2])
    tables = torch.full((9, batch.tables.shape[1]), -1, dtype=torch.int32)
    tables[seats] = batch.tables.where(batch.tables < len(batch.cache), -1)
    static = replace(
        plain,
        block_tables_SW=tables,
        query_starts_X=torch.tensor([*batch.starts, tokens, tokens, tokens], dtype=index_dtype),
        lengths_S=torch.tensor([*batch.lengths, 0, 0, 0], dtype=index_dtype),
        prompt_S=torch.tensor([False, False, False, True, False, False, False]),
        seats_S=torch.tensor([*seats, 8, 8, 8], dtype=index_dtype),
        max_length=600,
    )
    q = torch.cat([batch.q, torch.full((50, *batch.q.shape[1:]), torch.nan)])
    with checked_accesses():
        got = attend(batch, static, q)
    assert torch.equal(got[:tokens], expected)
    assert got[tokens:].isnan().all()  # as they were: nothing was written


def test_kernels_that_a_step_cannot_need_are_not_launched(backend):
    batch = filled(backend, AttentionCase(((1, 9), (1, 6))))
    for changes, kernels in (
        ({"has_prompts": False}, ["decode_attention_kernel"]),
        ({}, ["decode_attention_kernel", "prompt_attention_kernel"]),
        (
            {"has_prompts": False, "max_length": 257},
            ["decode_attention_kernel", "merge_splits_kernel"],
        ),
    ):
        with checked_accesses() as launches:
            close(attend(batch, step_of(batch, **changes)), batch.expected())
        assert [launch.kernel for launch in launches] == kernels


def test_a_window_bounds_the_splits_of_the_grid(backend):
    """Of a long context, programs are launched for what a window can reach, wherever it begins."""
    batch = filled(backend, AttentionCase(((1, 1200), (1, 800)), heads=2, kv_heads=1, window=200, block_size=16))
    index = prepare(step_of(batch), batch.cache, attention_facts(batch.q, 200))
    assert (index.num_splits, wrapper.num_slots(index, None), wrapper.num_slots(index, 200)) == (5, 5, 2)
    close(attend(batch, step_of(batch, has_prompts=False)), batch.expected())


def test_index_reads_no_tensor():
    """On the meta device nothing can be read, so nothing can wait for the device."""
    batch = Batch(AttentionCase(((1, 9), (4, 6))), torch.float32)
    step = step_of(batch)
    tensors = {name: getattr(step, name).to("meta") for name in ("block_tables_SW", "query_starts_X", "lengths_S")}
    index = prepare(replace(step, **tensors), batch.cache.to("meta"), attention_facts(batch.q))
    assert index.num_splits == 1


@pytest.mark.parametrize(
    ("length", "group", "size", "cache_dtype"),
    [(890, 7, 64, torch.bfloat16), (890, 4, 128, torch.bfloat16), (2000, 8, 128, FLOAT8)],
    ids=str,
)
def test_a_decode_moves_at_most_a_tenth_more_than_the_least(backend, length, group, size, cache_dtype):
    """Least: each key and value once, queries, results, and the tables' entries. Splits' results are more."""
    case = AttentionCase(((1, length),), heads=group, kv_heads=1, head_size=size, block_size=16, scale=0.1)
    batch = filled(backend, case, torch.bfloat16, cache_dtype)
    with checked_accesses() as launches:
        close(attend(batch, step_of(batch, has_prompts=False)), batch.expected())
    moved = sum(launch.loaded_bytes + launch.stored_bytes for launch in launches)
    kept = 2 * length * size * batch.cache.itemsize
    least = kept + 2 * batch.q.nbytes + 4 * (length // 16 + 1)
    assert least < moved <= 1.1 * least
