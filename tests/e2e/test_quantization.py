"""`engine.quantization` and `engine.dtype`: what they round, how little, and that tokens depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchinfer import LLM, SamplingParams
from batchinfer.errors import UsageError
from tests.e2e.same_tokens import same_tokens
from tests.e2e.test_kv_cache_dtype import answers

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)


KINDS: list[dict[str, str]] = [
    {"quantization": "int8"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "float32"},
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))


@each_kind
def test_cache_chunks_and_preemption_change_no_token(
    model: Path,
    kind: dict[str, str],
    plain_torch: bool,
) -> None:
    whole = answers(model, **kind, enable_prefix_caching=False)
    for other in ({}, {"max_step_tokens": 9}, {"preempt": True, "kv_cache_tokens": 160}):
        assert same_tokens(answers(model, **kind, **other), whole, plain_torch), other


@each_kind
def test_quantized_logprobs_differ_by_little_and_not_by_nothing(model: Path, kind: dict[str, str]) -> None:
    exact, rounded = answers(model), answers(model, **kind)
    firsts = [
        (a.logprobs[0].logprob, b.logprobs[0].logprob)
        for a, b in zip(exact, rounded, strict=True)
        if a.logprobs and b.logprobs and a.token_ids[0] == b.token_ids[0]
    ]
    assert len(firsts) > len(exact) // 2
    assert 0 < max(abs(a - b) for a, b in firsts) < 0.05


@pytest.mark.parametrize(
    ("dtype", "quantization", "layers", "ends"),
    [(None, None, False, False), ("bfloat16", None, True, True), ("bfloat16", "int8", False, True)],
)
def test_bfloat16_rounds_matrices_and_nothing_else(model: Path, dtype, quantization, layers, ends) -> None:
    """Every matrix and what it is multiplied with; what comes out of it is float32."""
    decoder = LLM(model, dtype=dtype, quantization=quantization)._engine._runner.decoder
    x = torch.randn(3, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for multiply, rounds in ((decoder.layers[0].attention.qkv, layers), (decoder.logits, ends)):
        result = multiply(x)
        assert torch.equal(result, multiply(x.bfloat16().float())) is rounds
        assert result.dtype == torch.float32 and not torch.equal(result, result.bfloat16().float())
    rows = decoder.embedding(torch.arange(3, 20))
    assert rows.dtype == torch.float32 and torch.equal(rows, rows.bfloat16().float()) is ends


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(UsageError, match="quantization: must be one of int8, got 'int4'"):
        LLM("fake", quantization="int4")


@each_kind
@pytest.mark.model
def test_a_trained_model_quantized_picks_nearly_the_same_tokens(smollm2_gguf: Path, kind: dict[str, str]) -> None:
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time there was"]
    exact, rounded = (
        LLM(smollm2_gguf, kv_cache_tokens=2048, **options).generate(prompts, GREEDY) for options in ({}, kind)
    )
    for a, b in zip(exact, rounded, strict=True):
        assert a.outputs[0].token_ids[0] == b.outputs[0].token_ids[0]
        first = [completion.outputs[0].logprobs[0].logprob for completion in (a, b)]
        assert abs(first[0] - first[1]) < 0.25
