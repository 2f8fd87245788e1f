"""Buckets of the eager backend: padding stays small whatever the mix of a step."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.contract import AttentionFacts
from batchinfer_kernels.eager.step_index import BUCKET_NUMBERS, SPLIT_SLOTS, TILE, prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import make_step

BLOCK = 16


def _buckets(sequences, window=None, head_size=1):
    counts, lengths = [n for n, _ in sequences], [length for _, length in sequences]
    blocks = -(-max(lengths) // BLOCK)
    tables = torch.arange(blocks * len(lengths), dtype=torch.int32).view(len(lengths), blocks)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    cache = torch.empty(tables.numel(), 2, 1, BLOCK, head_size)
    step = make_step(torch.zeros(starts[-1], dtype=torch.int64), tables, starts, lengths)
    return prepare(step, cache, AttentionFacts(1, (window,), torch.float32)).buckets[window]


def _area(buckets):
    """Query × slot pairs that are computed."""
    return sum(len(bucket.rows_M[0]) * bucket.num_queries for bucket in buckets)


def test_decodes_are_not_padded_to_the_chunk_beside_them():
    buckets = _buckets([(1, 100)] * 50 + [(512, 512)])
    decodes = [bucket for bucket in buckets if bucket.num_queries == 1]
    assert sum(len(bucket.queries_M) for bucket in decodes) == 50
    assert all(bucket.num_slots == 100 for bucket in decodes)


def test_one_long_context_does_not_pad_the_others():
    buckets = _buckets([(1, 200)] * 60 + [(1, 8000)])
    assert _area(buckets) == 60 * 200 + 8000
    assert len(buckets) == 2


def test_like_lengths_share_one_bucket_without_row_lists():
    (bucket,) = _buckets([(1, 250 + i) for i in range(8)])
    assert bucket.queries_M is None


def test_a_long_prompt_is_cut_so_that_early_queries_read_little():
    buckets = _buckets([(2048, 2048)])
    assert _area(buckets) < 0.65 * 2048 * 2048
    assert max(bucket.num_queries for bucket in buckets) == TILE


@pytest.mark.parametrize("count", [1, 100])
def test_a_window_is_all_that_is_read(count):
    (bucket,) = _buckets([(count, 5000)], window=64)
    assert bucket.num_slots == 64 + count - 1


def test_memory_does_not_follow_the_number_of_sequences():
    buckets = _buckets([(1, 3000)] * 40, head_size=512)
    assert max(len(bucket.rows_M[0]) * 512 for bucket in buckets) <= BUCKET_NUMBERS
    assert len(buckets) == 4
    assert sum(len(bucket.queries_M) for bucket in buckets) == 40


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3000)), min_size=1, max_size=40),
    st.none() | st.integers(1, 500),
)
def test_padding_is_bounded_and_every_row_is_computed(sequences, window):
    sequences = [(count, count + past) for count, past in sequences]
    buckets = _buckets(sequences, window)
    total = sum(count for count, _ in sequences)
    rows = [torch.arange(total) if bucket.queries_M is None else bucket.queries_M for bucket in buckets]
    assert torch.equal(torch.cat(rows).unique(), torch.arange(total))
    for bucket, queries in zip(buckets, rows, strict=True):
        tiles = len(bucket.rows_M[0]) // bucket.num_slots
        assert len(queries) == tiles * bucket.num_queries
        # as many queries again at most, and fewer padded slots than a bucket costs, per halving of the bucket
        assert bucket.num_queries <= TILE
        if tiles > 1:
            seen = bucket.num_slots if bucket.bias_I1XL is None else _slots_seen(bucket)
            wasted = int((bucket.num_slots - torch.as_tensor(seen)).sum()) * bucket.num_queries
            assert wasted <= SPLIT_SLOTS * (1 + torch.log(torch.tensor(float(tiles))).item())


def _slots_seen(bucket):
    """[I] how far the last query of each tile sees."""
    visible = bucket.bias_I1XL[:, 0, -1] == 0
    return visible.int().mul(torch.arange(1, bucket.num_slots + 1, dtype=torch.int32)).amax(dim=1)
