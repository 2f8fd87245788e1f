"""Ops that C++ hands to the eager backend: the right result, and one report for each kind of argument."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.contract import Fallback, ScoreRule
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.formats import Precision

from batchinfer.models.weights import load_decoder
from batchinfer.ops.choose import log_fallback
from tests.kernels.cases import ATTENTION, attention_facts, make_step, seeded
from tests.kernels.test_ops import Batch
from tests.models.tiny import Paged, build

pytestmark = pytest.mark.skipif(cpu.problem() is not None, reason=str(cpu.problem()))

HALF = torch.float16
EAGER = EagerBackend(torch.device("cpu"))


@pytest.fixture
def reported() -> list[Fallback]:
    return []


@pytest.fixture
def backend(reported, plain_torch):
    if plain_torch:
        pytest.skip("--eager-kernels")
    return cpu.CPUBackend(reported.append)


def _x(*shape, dtype=torch.float32):
    return seeded(*shape, seed=1, dtype=dtype)


def _strided(rows, width):
    return _x(rows, 2 * width)[:, ::2]


OPS = {
    "rms_norm": lambda ops, x: ops.rms_norm(x, torch.ones(8, dtype=x.dtype), 1e-5),
    "add_rms_norm": lambda ops, x: ops.add_rms_norm(x, torch.zeros_like(x), torch.ones(8, dtype=x.dtype), 1e-5),
    "silu_mul": lambda ops, x: ops.silu_mul(x),
    "gelu_mul": lambda ops, x: ops.gelu_mul(x),
}


@pytest.mark.parametrize("x", [_x(3, 8, dtype=HALF), _strided(3, 8)], ids=["dtype", "strides"])
@pytest.mark.parametrize("op", OPS)
def test_element_wise_ops_fall_back_for_dtypes_and_strides(backend, reported, op, x):
    for _ in range(2):
        assert torch.equal(OPS[op](backend, x), OPS[op](EAGER, x))
    (one,) = reported
    assert one.op == op and str(x.dtype).removeprefix("torch.") in one.dtype and "[3, 8]" in one.shape
    assert x.is_contiguous() or str(x.stride()) in one.why


def test_a_new_shape_is_no_new_report_but_a_new_dtype_is(backend, reported):
    for rows, dtype in ((1, HALF), (2, HALF), (2, torch.bfloat16), (3, torch.bfloat16)):
        backend.silu_mul(_x(rows, 8, dtype=dtype))
    assert [(one.op, one.dtype, one.shape) for one in reported] == [
        ("silu_mul", "float16", "[1, 8]"),
        ("silu_mul", "bfloat16", "[2, 8]"),
    ]


def test_strides_are_one_reason_however_they_change_with_the_step(backend, reported):
    for rows in (3, 4, 5):
        backend.silu_mul(_x(8, rows).T)
    assert [one.why for one in reported] == ["strides (1, 3)"]


def test_a_dtype_is_the_reason_whatever_the_strides(backend, reported):
    for tokens in (3, 1):  # one token has no gaps
        heads = _x(tokens, 4, 8, dtype=HALF)[:, :2]
        backend.rms_norm(heads, torch.ones(8, dtype=HALF), 1e-5)
    assert [one.why for one in reported] == ["dtype"]


def test_half_precision_matrices_fall_back_when_packed_and_when_multiplied(backend, reported):
    x, weight = _x(3, 32, dtype=HALF), _x(64, 32, dtype=HALF)
    packed = backend.pack(weight, Precision.FLOAT16)
    gated = backend.pack_gated(weight, Precision.FLOAT16)
    for _ in range(2):
        assert torch.equal(backend.linear(x, packed, None), x @ weight.T)
        assert torch.equal(backend.gated_linear(x, gated, None, "silu"), EAGER.silu_mul(x @ weight.T))
    assert [one.op for one in reported] == ["pack", "linear", "silu_mul"]


def test_attention_of_half_precision_queries_falls_back(backend, reported):
    batch, same = Batch(ATTENTION["mixed"], HALF), Batch(ATTENTION["mixed"], HALF)
    for _ in range(2):
        got = batch.write_and_attend(backend)
    assert torch.equal(got, same.write_and_attend(EAGER))
    assert [one.op for one in reported] == ["rope_kv_write", "paged_attention"]


def test_attention_over_a_cache_with_gaps_falls_back(backend, reported):
    q, tables = _x(4, 2, 8), torch.tensor([[1, 0]], dtype=torch.int32)
    step = make_step(torch.arange(4), tables, [0, 4], [4])
    cache = _x(2, 2, 2, 3, 16)[..., ::2]
    index = backend.prepare(step, cache, attention_facts(q))
    dense = cache.contiguous()
    expected = EAGER.paged_attention(q, dense, EAGER.prepare(step, dense, attention_facts(q)), ScoreRule(0.3))
    try:
        got = backend.paged_attention(q, cache, index, ScoreRule(0.3))
    except RuntimeError:  # torch views the cache as rows
        got = None
    assert got is None or torch.equal(got, expected)
    assert [one.op for one in reported] == ["paged_attention"] and "strides" in reported[0].why


def test_copies_between_caches_with_gaps_fall_back(backend, reported):
    sparse = [_x(3, 2, 1, 2, 8)[..., ::2]]
    before = sparse[0].clone()
    for _ in range(2):
        backend.copy_blocks(sparse, [0], [2])
    assert torch.equal(sparse[0], before[[0, 1, 0]]) and [one.op for one in reported] == ["copy_blocks"]


class TestLayerStack:
    """Steps and weights that the fused layers cannot take go to the layers op by op."""

    ROW = tuple(range(3, 20))

    @pytest.fixture
    def decoder(self, tmp_path, backend):
        build("llama", tmp_path)
        return load_decoder(tmp_path, backend=backend)

    def _logits(self, decoder, change=lambda paged: None):
        paged = Paged(decoder, sequences=1)
        change(paged)
        return torch.cat([paged.step({0: list(self.ROW[:9])}), paged.step({0: list(self.ROW[9:])})])

    def _with_cache(self, decoder, changed):
        def change(paged):
            paged.cache = changed(paged.cache)

        return self._logits(decoder, change)

    def test_a_cache_of_float64(self, decoder, reported):
        got = self._with_cache(decoder, lambda cache: [one.double() for one in cache])
        torch.testing.assert_close(got, self._logits(decoder), atol=1e-4, rtol=1e-4)
        assert [one.op for one in reported] == ["layer_stack", "rope_kv_write", "paged_attention"]
        assert "float64" in reported[0].dtype

    def test_layers_with_caches_of_different_dtypes(self, decoder, reported):
        self._with_cache(decoder, lambda cache: [cache[0].bfloat16(), *cache[1:]])
        assert [one.why for one in reported] == ["layers with different KV caches"]

    def test_row_numbers_of_another_type(self, decoder, reported):
        run = decoder._stack.run_layers
        decoder._stack.run_layers = lambda x, turns, caches, index, rows: run(x, turns, caches, index, rows.int())
        assert torch.equal(self._logits(decoder), self._logits(decoder))
        assert [(one.op, one.dtype) for one in reported] == [("layer_stack", "int32")]

    def test_tensors_with_gaps(self, decoder, reported):
        expected, run = self._logits(decoder), decoder._stack.run_layers

        def with_gaps(x, *rest):
            return run(x.repeat_interleave(2, 1)[:, ::2], *rest)

        decoder._stack.run_layers = with_gaps
        torch.testing.assert_close(self._logits(decoder), expected, atol=1e-5, rtol=1e-5)
        assert [one.op for one in reported] == ["layer_stack", "add_rms_norm"] and "strides" in reported[0].why

    def test_a_stack_without_row_numbers_returns_all_rows(self, decoder, reported):
        run = decoder._stack.run_layers
        expected = self._logits(decoder)
        decoder._stack.run_layers = lambda x, turns, caches, index, rows: run(x, turns, caches, index, None)
        assert torch.equal(self._logits(decoder), expected) and not reported
        decoder._stack = decoder._stack._op_by_op
        assert torch.equal(self._logits(decoder), expected) and not reported


def test_a_fallback_is_logged_with_op_dtype_and_shape(capsys):
    backend = cpu.CPUBackend(log_fallback)
    for rows in (1, 2):
        backend.silu_mul(torch.zeros(rows, 4, dtype=HALF))
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in ("silu_mul", "float16", "[1, 4]"))
