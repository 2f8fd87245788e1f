"""Property tests: a prompt's completion does not depend on the other prompts or on their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer import LLM, Completion, SamplingParams
from batchinfer.pipeline.encoding import PromptOptions
from batchinfer.pipeline.prompt import Prompt
from batchinfer.pipeline.scoring import Pooled, Rolling, continuations
from batchinfer.spec import FakeSpec

CONTEXTS = ["is", "is ", "is\n", "is  ", "is \u3000", "i", "", " ", [105, 115], [105, 115, 32]]
TEXTS = ["Paris", " Paris", "  Paris", "\n Paris", [80, 97], " "]
CHAT = [{"role": "user", "content": "is"}]
PARAMS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"temperature": 0.7},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 0.7, "seed": 1, "n": 3},
    {"temperature": 0.7, "seed": 2},
    {"stop": ["e", "E"], "max_tokens": 30},
    {"stop": ["e", "E"], "min_tokens": 4},
    {"stop": ["e", "E"], "include_stop_str_in_output": True},
    {"max_tokens": 3},
    {"max_tokens": 3, "min_tokens": 3},
    {"logprobs": 0},
    {"logprobs": 2},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 2, "max_tokens": 0},
    {"skip_special_tokens": False},
    {"stop_token_ids": [101]},
    {"structured_outputs": {"json": {"type": "object"}}},
    {"logit_bias": {5: 1.0}},
]
OPTIONS = [None, PromptOptions(True, {}, whole_answer=True), PromptOptions(False, {"add_generation_prompt": False})]


def generate_prompts() -> st.SearchStrategy[Prompt]:
    params = st.sampled_from(PARAMS).map(lambda given: SamplingParams(**{"temperature": 0, "max_tokens": 20, **given}))
    contents = st.sampled_from([["is"], ["is "], ["is\n"], [[105, 115]], [CHAT]])
    return st.builds(Prompt, st.just(0), contents, params, st.integers(0, 2), options=st.sampled_from(OPTIONS))


def score_and_embed_prompts() -> st.SearchStrategy[Prompt]:
    texts = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2)
    scored = st.builds(continuations, texts, st.sampled_from(["sum", "tokens", "characters"]))
    pooled = st.builds(Pooled, st.sampled_from(["mean", "last", "cls"]), st.booleans(), st.sampled_from([None, 16, 3]))
    contents = st.sampled_from(CONTEXTS).map(lambda context: [context])
    rolled = st.sampled_from([["is"], ["is "], ["is" * 20], [[105, 115]]])
    return st.one_of(
        st.builds(Prompt, st.just(0), contents, read=scored),
        st.builds(Prompt, st.just(0), rolled, read=st.one_of(pooled, st.just(Rolling()))),
    )


def fake_llm() -> LLM:
    return LLM("fake", fake=FakeSpec(answer_tokens=(3, 15)), max_model_len=90, kv_cache_tokens=400, max_num_seqs=4)


def completions_of(llm: LLM, prompts: list[Prompt]) -> list[Completion]:
    """Return the completions in prompt order, with the fields cleared that may depend on other prompts."""
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    completions = sorted(llm.run_prompts(numbered), key=lambda completion: completion.index)
    assert [completion.index for completion in completions] == list(range(len(prompts)))
    return [replace(completion, index=0, cached_tokens=0) for completion in completions]


@pytest.fixture(scope="module")
def shared() -> LLM:
    return fake_llm()


ALONE: dict[str, Completion] = {}


def equals_single_run(completion: Completion, prompt: Prompt) -> bool:
    key = repr(prompt)
    if key not in ALONE:
        ALONE[key] = completions_of(fake_llm(), [prompt])[0]
    alone = ALONE[key]
    return replace(completion, error=None) == replace(alone, error=None) and repr(completion.error) == repr(alone.error)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(generate_prompts(), score_and_embed_prompts()), min_size=2, max_size=24),
    st.randoms(use_true_random=False),
)
def test_completion_in_a_batch_equals_single_run(shared, prompts, rng):
    prompts = prompts + rng.sample(prompts, len(prompts))
    for prompt, completion in zip(prompts, completions_of(shared, prompts), strict=True):
        assert equals_single_run(completion, prompt), prompt


def test_score_counts_trailing_spaces_of_the_context():
    pairs = [("France is", " Paris"), ("France is ", " Paris"), ("France is\n", " Paris")]
    expected = [fake_llm().score([pair])[0].scores for pair in pairs]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert [completion.scores for completion in fake_llm().score([pairs[i] for i in order])] == [
            expected[i] for i in order
        ]
    assert len({scores[0].logprob for scores in expected}) == 3
