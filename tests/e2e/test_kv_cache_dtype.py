"""`engine.kv_cache_dtype` from end to end: what it rounds, what it leaves alone, and how many tokens then fit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from batchinfer import LLM, SamplingParams
from batchinfer.errors import UsageError
from batchinfer.request import CompletionOutput
from batchinfer.runner import kv_cache
from tests.harness import expect_short_answers
from tests.models.tiny import SIZES

GREEDY = SamplingParams(temperature=0, max_tokens=14, logprobs=0)
KINDS = ("float32", "bfloat16", "float16")


def answers(model: Path, preempt: bool = False, **options: object) -> list[CompletionOutput]:
    """Of prompts that share beginnings; with `preempt` more are admitted than the cache holds."""
    rng = random.Random(2)
    words = range(3, SIZES["vocab_size"])
    shared = rng.choices(words, k=30)
    prompts = [shared[: rng.randrange(30)] + rng.choices(words, k=rng.randrange(1, 30)) for _ in range(16)]
    llm = LLM(model, block_size=4, max_num_seqs=8, **options)
    if preempt:
        expect_short_answers(llm._engine.scheduler)
    completions = llm.generate(prompts, GREEDY)
    assert (llm.stats().preemptions > 0) is preempt
    assert (llm.stats().prompt_tokens_reused > 0) is options.get("enable_prefix_caching", True)
    return [completion.outputs[0] for completion in completions]


def tokens(outputs: list[CompletionOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_chunks_and_preemption_change_no_token(model: Path, kind: str) -> None:
    whole = answers(model, kv_cache_dtype=kind, enable_prefix_caching=False)
    assert tokens(answers(model, kv_cache_dtype=kind)) == tokens(whole)
    assert tokens(answers(model, kv_cache_dtype=kind, max_step_tokens=9)) == tokens(whole)
    assert tokens(answers(model, preempt=True, kv_cache_dtype=kind, kv_cache_tokens=160)) == tokens(whole)


def test_the_default_is_what_is_computed_and_16_bits_round(model: Path) -> None:
    default, *others = [answers(model, kv_cache_dtype=kind) for kind in (None, *KINDS)]
    assert others[0] == default
    first = [[output.logprobs[0].logprob for output in outputs] for outputs in (default, *others)]
    for rounded, error in ((first[2], 0.2), (first[3], 0.02)):
        assert 0 < max(abs(a - b) for a, b in zip(first[0], rounded, strict=True)) < error


def test_a_16_bit_kv_cache_holds_twice_as_many_tokens(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(kv_cache, "free_bytes", lambda: 1 << 22)
    sizes = [len(LLM(model, kv_cache_dtype=kind)._engine.scheduler.pool.blocks) for kind in (None, *KINDS)]
    assert sizes == [128, 128, 256, 256]
    assert '"kv_cache_dtype": "bfloat16"' in capfd.readouterr().err
    halves = LLM(model, dtype="bfloat16")
    assert len(halves._engine.scheduler.pool.blocks) == 256
    assert halves._engine._runner.cache.layers[0].dtype == torch.bfloat16


def test_an_unknown_kv_cache_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="kv_cache_dtype: must be one of float32, bfloat16, float16, got 'int8'"):
        LLM("fake", kv_cache_dtype="int8")
