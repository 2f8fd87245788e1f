"""The benchmark runs where there is no GPU, on sizes that mean nothing, and prints every row."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import benchmark, engine_rates, op_rates
from tests.gpu.random_model import TINY, random_decoder
from tests.gpu.rig import make_rig


def test_all_tables_are_printed():
    shown: list[str] = []
    text = benchmark.measure(make_rig("pretend"), True, shown.append)
    ops = ["copy", "product", "decode attention", "prompt attention", "linear qkv", "linear out", "linear gate_up"]
    ops += ["linear down", "rms_norm", "add_rms_norm", "silu_mul", "rope_kv_write", "sampling", "logprobs"]
    for op in ops:
        assert f"| {op} |" in text
    assert "| tiny | 0 | 4 |" in text and "| tiny | 1 | 4 |" in text
    assert len([line for line in text.splitlines() if line.startswith("| model |")]) == 3
    assert f"torch {torch.__version__}" in text
    assert "".join(shown).count("| model |") == 3


def test_ops_run_on_the_interpreted_kernels():
    pytest.importorskip("triton")
    rates = list(op_rates.op_rates(make_rig("interpreted"), op_rates.TINY, torch.float32, False))
    assert {rate.op for rate in rates} >= {"decode attention", "prompt attention", "rope_kv_write", "sampling"}
    assert all(rate.seconds > 0 and rate.moved_bytes > 0 for rate in rates)


def test_bytes_of_decode_attention_are_the_cache_and_its_queries():
    decode = next(op_rates.op_rates(make_rig("pretend"), op_rates.TINY, torch.float32, False))
    assert decode.moved_bytes == 3 * 40 * 2 * 2 * 16 * 4 + 2 * 3 * 4 * 16 * 4
    assert decode.operations == 3 * 40 * 4 * 16 * 4


def test_the_workload_is_that_of_other_engines():
    requests = engine_rates._requests(256, (100, 1024), (100, 1024), 151_936)
    assert len(requests) == 256
    assert all(100 <= len(request.prompt) <= 1024 and 100 <= request.max_tokens <= 1024 for request in requests)
    assert 240 * 562 < sum(request.max_tokens for request in requests) < 270 * 562


def test_random_weights_are_the_same_on_every_backend():
    one, other = (random_decoder(TINY, make_rig(name).backend, torch.float32) for name in ("pretend", "pretend"))
    hidden_NE = torch.randn(3, TINY["hidden_size"])
    with torch.inference_mode():
        assert torch.equal(one.logits(hidden_NE), other.logits(hidden_NE))
