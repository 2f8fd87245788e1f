"""`engine.quantization` from end to end: what it rounds, how little, and that tokens depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchinfer import LLM, SamplingParams
from batchinfer.errors import UsageError
from tests.e2e.test_kv_cache_dtype import answers, model, tokens  # noqa: F401 - a fixture

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)


def test_cache_chunks_and_preemption_change_no_token(model: Path) -> None:  # noqa: F811
    whole = answers(model, quantization="int8", enable_prefix_caching=False)
    assert tokens(answers(model, quantization="int8")) == tokens(whole)
    assert tokens(answers(model, quantization="int8", max_step_tokens=9)) == tokens(whole)
    assert tokens(answers(model, preempt=True, quantization="int8", kv_cache_tokens=160)) == tokens(whole)


def test_it_rounds_and_only_a_little(model: Path) -> None:  # noqa: F811
    exact, rounded = answers(model), answers(model, quantization="int8")
    firsts = [
        (a.logprobs[0].logprob, b.logprobs[0].logprob)
        for a, b in zip(exact, rounded, strict=True)
        if a.logprobs and b.logprobs and a.token_ids[0] == b.token_ids[0]
    ]
    assert len(firsts) > len(exact) // 2
    assert 0 < max(abs(a - b) for a, b in firsts) < 0.05


def test_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="quantization: Input should be 'int8', got 'int4'"):
        LLM("fake", quantization="int4")


@pytest.mark.model
def test_a_trained_model_says_nearly_the_same(smollm2_gguf: Path) -> None:
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time there was"]
    exact, rounded = (
        LLM(smollm2_gguf, quantization=kind, kv_cache_tokens=2048).generate(prompts, GREEDY) for kind in (None, "int8")
    )
    for a, b in zip(exact, rounded, strict=True):
        assert a.outputs[0].token_ids[0] == b.outputs[0].token_ids[0]
        first = [completion.outputs[0].logprobs[0].logprob for completion in (a, b)]
        assert abs(first[0] - first[1]) < 0.25
