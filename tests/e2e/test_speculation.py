"""`engine.speculative_tokens` changes no answer: not a token, not a bit of a logprob."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from batchinfer import LLM, SamplingParams
from batchinfer.engine.stats import EngineStats
from batchinfer.request import CompletionOutput
from tests.e2e.same_tokens import same_tokens
from tests.e2e.test_kv_cache_dtype import tokens
from tests.harness import expect_short_answers
from tests.models.tiny import SIZES


def asked() -> list[tuple[list[int], SamplingParams]]:
    """Repetitive prompts and others; requests that may have drafts beside some that may not."""
    rng = random.Random(7)
    words = range(3, SIZES["vocab_size"])
    kinds = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.0, "stop": ["w30 ", "w31 "]},
        {"temperature": 1.0, "seed": 5, "n": 3, "logprobs": 0},
        {"temperature": 0.05, "seed": 6, "top_k": 5, "logprobs": 2},
        {"temperature": 0.0, "stop_token_ids": [7, 11, 40, 41]},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.3, "min_tokens": 9, "logit_bias": {12: 3.0}},
    ]
    found = []
    for number in range(42):
        loop = rng.choices(words, k=rng.randrange(1, 7)) * 4
        prompt = rng.choices(words, k=rng.randrange(1, 20)) + (loop if number % 3 else [])
        found.append((prompt, SamplingParams(**{"max_tokens": 3 + number, **kinds[number % len(kinds)]})))
    return found


def answers(
    folder: Path, most: int, preempt: bool = False, **options: object
) -> tuple[list[CompletionOutput], EngineStats]:
    llm = LLM(folder, block_size=4, speculative_tokens=most, **{"max_num_seqs": 8, **options})
    if preempt:
        expect_short_answers(llm._engine.scheduler)
    prompts, params = zip(*asked(), strict=True)
    completions = llm.generate(prompts, params)
    assert all(completion.error is None for completion in completions)
    return [output for completion in completions for output in completion.outputs], llm.stats()


def check_equal(found: list[CompletionOutput], wanted: list[CompletionOutput], plain_torch: bool) -> None:
    assert tokens(found) == tokens(wanted)
    assert plain_torch or found == wanted  # its sums depend on how many rows there are


@pytest.mark.parametrize("most", [1, 4, 16])
def test_answers_and_logprobs_are_equal_bit_by_bit(model: Path, most: int, plain_torch: bool) -> None:
    """Without a prefix cache: what a prompt finds in it depends on when it comes, and with that its last bits."""
    plain, without = answers(model, 0, enable_prefix_caching=False)
    drafted, stats = answers(model, most, enable_prefix_caching=False)
    check_equal(drafted, plain, plain_torch)
    assert without.draft_tokens == without.accepted_tokens == 0
    assert 0 < stats.accepted_tokens < stats.draft_tokens and stats.steps < without.steps
    assert stats.generated_tokens == without.generated_tokens


def test_drafts_change_no_token_with_prefix_cache_preemption_and_short_steps(model: Path) -> None:
    plain, _ = answers(model, 0)
    drafted, stats = answers(model, 4)
    assert stats.prompt_tokens_reused > 0 and stats.accepted_tokens > 0
    assert tokens(drafted) == tokens(plain)
    tight, stats = answers(model, 4, preempt=True, kv_cache_tokens=200)
    assert stats.preemptions > 0 and stats.accepted_tokens > 0
    assert tokens(tight) == tokens(plain)
    short, stats = answers(model, 4, max_step_tokens=13)
    assert stats.accepted_tokens > 0 and tokens(short) == tokens(plain)


@pytest.mark.parametrize("kind", [{}, {"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.model
def test_drafts_change_no_token_of_a_trained_model(smollm2_gguf: Path, kind: dict[str, str], plain_torch: bool) -> None:
    text = "Repeat this list three times: apples, pears, plums, cherries.\nApples, pears, plums, cherries.\nApples,"
    found = []
    for most in (0, 4):
        llm = LLM(smollm2_gguf, kv_cache_tokens=4096, speculative_tokens=most, **kind)
        params = [SamplingParams(temperature=t, seed=1, max_tokens=40, logprobs=1) for t in (0.0, 0.7)]
        found.append([output for completion in llm.generate([text, text], params) for output in completion.outputs])
    if plain_torch and kind:
        assert same_tokens(*found, rounded_in_torch=True)
    else:
        check_equal(*found, plain_torch)
    assert llm.stats().accepted_tokens > 10
