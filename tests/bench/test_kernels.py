"""The cases of `bench kernels`: their bytes and operations by hand, and that every one of them runs."""

from __future__ import annotations

import pytest
import torch

from batchinfer.bench import kernels
from batchinfer.bench.kernels import Case, Shapes, all_cases, describe, measure
from batchinfer.bench.timing import Timing
from batchinfer.ops.choose import available_backends
from tests.bench.test_figures import make_machine

SMALL = Shapes("small", hidden=16, heads=4, kv_heads=2, head_size=8, feed_forward=24, vocabulary=40)


@pytest.fixture(autouse=True)
def small(quick_machine, monkeypatch):
    monkeypatch.setattr(kernels, "_BUDGET_S", 0.0)
    smaller = {"_CONTEXT": 20, "_PROMPT": 20, "_DECODES": 3, "_TOKENS": (5,), "_ROWS": (1, 4), "_NARROW_ROWS": (4,)}
    for name, value in smaller.items():
        monkeypatch.setattr(kernels, name, value)


def test_bytes_and_operations_equal_hand_counts():
    cases = {f"{case.op} {case.shape}": (case.data_bytes, case.operations) for case in all_cases(SMALL)}
    kv, queries = 2 * 3 * 20 * 2 * 8, 2 * 3 * 4 * 8
    assert cases["paged_attention 3 decodes x 20, float32 KV"] == (4 * kv + 4 * queries, 4 * 3 * 20 * 4 * 8)
    assert cases["paged_attention 3 decodes x 20, bfloat16 KV"] == (2 * kv + 4 * queries, 4 * 3 * 20 * 4 * 8)
    prompt = cases["paged_attention prompt of 20, float32 KV"]
    assert prompt == (4 * 2 * 20 * 2 * 8 + 4 * 2 * 20 * 4 * 8, 4 * (20 * 21 // 2) * 4 * 8)
    assert cases["rms_norm 5 tokens"] == (4 * 2 * 5 * 16, 0)
    assert cases["rope_kv_write 5 tokens"] == (4 * 5 * (2 * 6 * 8 + 3 * 2 * 8 + 8), 0)
    assert cases["silu_mul 5 tokens"] == cases["gelu_mul 5 tokens"] == (4 * 3 * 5 * 24, 0)
    assert cases["gated_linear gate_up 16x48, 4 rows"] == (4 * (16 * 48 + 4 * 40), 2 * 4 * 16 * 48)
    assert cases["linear down 24x16, 4 rows"] == (4 * (24 * 16 + 4 * 40), 2 * 4 * 24 * 16)
    assert cases["linear down 24x16, 4 rows in int8"] == (24 * 16 + 4 * 4 * 40, 2 * 4 * 24 * 16)
    assert cases["gated_linear gate_up 16x48, 4 rows in bfloat16"] == (2 * 16 * 48 + 4 * 4 * 40, 2 * 4 * 16 * 48)
    assert cases["linear_argmax lm_head 16x40, 4 rows in bfloat16"] == (2 * 16 * 40 + 4 * 4 * 16, 2 * 4 * 16 * 40)


def test_every_case_runs_on_every_backend():
    found = list(measure(SMALL, make_machine()))
    backends = {backend.capabilities.name for backend in available_backends()}
    cases = all_cases(SMALL)
    for case in cases:
        ran = {one.backend for one in found if (one.op, one.shape) == (case.op, case.shape)}
        assert ran == backends, case
    assert {case.op for case in cases} == {
        *("paged_attention", "rms_norm", "add_rms_norm", "rope_kv_write", "silu_mul", "gelu_mul"),
        *("linear", "gated_linear", "linear_argmax"),
    }
    assert len(describe(found).splitlines()) == 1 + len(found)


def read_at(bytes_per_s, monkeypatch):
    in_turn = kernels._in_turn
    monkeypatch.setattr(kernels, "_in_turn", lambda *given: (in_turn(*given)[0], bytes_per_s))


def test_the_limit_is_the_median_of_the_fastest_reading(monkeypatch):
    medians = {"sum": 3.0, "dot": 2.0, "matrix times vector": 4.0}
    timed = lambda works, *rest, **also: {name: Timing(0.5, medians.get(name, 9.0), 1) for name in works}  # noqa: E731
    monkeypatch.setattr(kernels, "time_in_turn", timed)
    found = list(measure(SMALL, make_machine(), [Case("x", "", 6000, 0, lambda backend: lambda: None)]))
    assert [one.limit_s for one in found] == [pytest.approx(2.0 * 6000 / 8192)] * len(available_backends())
    assert all(one.median_s == 9.0 for one in found)


def test_case_of_many_layers_is_measured_after_an_uncounted_round(monkeypatch):
    called = []

    def make(backend):
        made = len(called)
        called.append(0)

        def work():
            called[made] += 1

        return work

    monkeypatch.setattr(kernels, "_BUDGET_S", 0.0)
    found = list(measure(SMALL, make_machine(), [Case("x", "", 4096, 0, make, turns=7)]))
    assert [one.samples for one in found] == [5 * 7] * len(called)
    assert called == [1 + 5 * (7 + 7)] * len(called)


def test_arithmetic_limit_uses_the_rate_of_its_type(monkeypatch):
    read_at(1e9, monkeypatch)
    rates = {torch.bfloat16: 2e6, torch.int8: 4e6}
    monkeypatch.setattr(kernels, "gemm_rate", rates.pop)  # each is measured once
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.bfloat16)
    made = [Case("x", "", 1, 1000, lambda backend: lambda: None, dtype=dtype) for dtype in dtypes]
    found = [one for one in measure(SMALL, make_machine(gemm_per_s=1e6), made) if one.backend == "eager"]
    assert [one.limit_s for one in found] == pytest.approx([1e-3, 5e-4, 2.5e-4, 5e-4])


def test_limit_is_the_longer_of_both(monkeypatch):
    read_at(1e6, monkeypatch)
    machine = make_machine(gemm_per_s=1e6, caches={"L1": 100, "L2": 1000, "L3": 3000}, threads=2)
    made = [
        Case("x", "", size, work, lambda backend: lambda: None)
        for size, work in ((200, 100), (1500, 1600), (2500, 0), (9000, 1))
    ]
    found = [one for one in measure(SMALL, machine, made) if one.backend == "eager"]
    assert [one.limit_s for one in found] == pytest.approx([2e-4, 1.6e-3, 2.5e-3, 9e-3])
    assert [one.bound for one in found] == ["bytes", "arithmetic", "bytes", "bytes"]
    assert [one.fits for one in found] == ["L1", "L2", "L3", "memory"]
    assert found[0].times_over == found[0].median_s / found[0].limit_s
