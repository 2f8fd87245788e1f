"""What C++ promises beyond the ops' meaning: results that depend on nothing else, and one pool of threads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.contract import ScoreRule
from batchinfer_kernels.cpu import library

from batchinfer.ops.choose import load_backend
from tests.kernels.cases import ATTENTION, attention_facts, make_step, on_threads
from tests.kernels.test_ops import Batch

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("name", ["mixed-sizes", "window-pieces", "pieces", "many-decodes", "many-padded"])
def test_a_sequence_s_result_depends_on_nothing_else(ops, name):
    case = ATTENTION[name]
    batch = Batch(case, torch.float32)
    together = on_threads(3, lambda: batch.write_and_attend(ops))
    start = 0
    for s, (count, length) in enumerate(case.sequences):
        rows = slice(start, start + count)
        q, rule = batch.q[rows], ScoreRule(case.scale, case.window)
        step = make_step(batch.slots[rows], batch.tables[s : s + 1], [0, count], [length])
        alone = ops.prepare(step, batch.cache, attention_facts(q, case.window))
        got = on_threads(1, lambda q=q, alone=alone, rule=rule: ops.paged_attention(q, batch.cache, alone, rule))
        assert torch.equal(got, together[rows]), s
        start += count


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("count", [2, 40])
def test_sequences_that_share_blocks_get_what_each_gets_alone(ops, count, window):
    """One at several lengths, as a draft is verified, and another that begins alike: one thread takes them in turn."""
    torch.manual_seed(0)
    size, lengths = 16, [1100 - i % 7 if i % 2 else 530 + 9 * i for i in range(count)]
    cache = torch.randn(200, 2, 2, size, 32)
    tables = torch.randperm(200)[: 2 * 69].view(2, 69)[torch.arange(count) * 2 // count].to(torch.int32)
    tables[:, :20] = tables[0, :20]
    q, rule = torch.randn(count, 6, 32), ScoreRule(0.2, window)

    def attend(rows: slice) -> torch.Tensor:
        some = lengths[rows]
        slots = torch.zeros(len(some), dtype=torch.int64)
        step = make_step(slots, tables[rows], list(range(len(some) + 1)), some)
        index = ops.prepare(step, cache, attention_facts(q, window))
        return ops.paged_attention(q[rows], cache, index, rule)

    together = on_threads(3, lambda: attend(slice(0, count)))
    for i in range(count):
        assert torch.equal(together[i : i + 1], on_threads(1, lambda i=i: attend(slice(i, i + 1)))), i


def test_queries_may_be_a_view_of_fused_heads(ops):
    batch = Batch(ATTENTION["mixed"], torch.float32)
    expected = batch.write_and_attend(ops)
    fused = torch.randn(len(batch.q), 7, batch.q.shape[2])
    fused[:, 1:5] = batch.q
    batch.q = fused[:, 1:5]
    assert torch.equal(batch.write_and_attend(ops), expected)


@pytest.mark.parametrize(("first", "last"), [(200, 300), (299, 300), (0, 1), (131, 132), (3, 5)])
def test_a_chunk_gives_what_the_whole_prompt_gives(ops, first, last):
    case = ATTENTION["long-chunk"]
    batch = Batch(case, torch.float32)
    whole = batch.write_and_attend(ops)[:300]
    slots, tables, rule = batch.slots[first:last], batch.tables[:1], ScoreRule(case.scale)
    step = make_step(slots, tables, [0, last - first], [10 + last], [True])
    index = ops.prepare(step, batch.cache, attention_facts(batch.q))
    assert torch.equal(ops.paged_attention(batch.q[first:last], batch.cache, index, rule), whole[first:last])


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cache_writes_round_as_torch_does(ops, cache_dtype):
    edges = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        65504.0,
        65519.99,
        65520.0,
        6e-8,
        2.9e-8,
        3.1e-8,
        -6.1e-5,
        3.4e38,
    ]
    spread = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * 10.0 ** torch.randint(-9, 6, (2000,))
    x = torch.cat([torch.tensor(edges), spread, spread.to(cache_dtype).float() * 1.001953125])
    rows = x[: len(x) // 4 * 4].view(-1, 1, 4)
    cache = torch.zeros(len(rows), 2, 1, 1, 4, dtype=cache_dtype)
    slots = torch.arange(len(rows))
    step = make_step(slots, slots.int().view(-1, 1), list(range(len(rows) + 1)), [1] * len(rows))
    index = ops.prepare(step, cache, attention_facts(rows))
    ops.rope_kv_write(rows, rows, rows, None, cache, index)
    torch.testing.assert_close(cache[:, 0].reshape(-1), rows.to(cache_dtype).view(-1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache[:, 0].nan_to_num(), cache[:, 1].nan_to_num())


def test_nan_in_a_query_is_not_hidden(ops):
    batch = Batch(ATTENTION["mixed"], torch.float32)
    batch.q[0, 0, 0] = torch.nan
    out = batch.write_and_attend(ops)
    assert out[0, 0].isnan().all()
    assert not out[1:].isnan().any()


def test_one_openmp_runtime_is_loaded(ops):
    batch = Batch(ATTENTION["mixed"], torch.float32)
    on_threads(2, lambda: batch.write_and_attend(ops))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    runtimes = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*", maps.read_text()))
    assert len(runtimes) == 1, runtimes


def test_without_the_library_eager_serves_and_the_log_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(library, "_PATH", tmp_path / "_ops.so")
    backend = load_backend("cpu")
    for _ in range(2):
        assert torch.equal(backend.silu_mul(torch.zeros(2, 4)), torch.zeros(2, 2))
    assert capsys.readouterr().err.count("C++ kernels are not there") == 1


def test_a_broken_library_is_no_failure(monkeypatch, tmp_path):
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "_PATH", broken)
    for cached in (library._library, library.variants, library.load):
        monkeypatch.setattr(library, cached.__name__, cached.__wrapped__)
    assert str(broken) in cpu.problem()
