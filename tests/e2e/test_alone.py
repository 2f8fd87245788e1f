"""With a model: what others have left in the cache, proposed as drafts or been given as masks changes no answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer import LLM, Completion, SamplingParams
from batchinfer.pipeline.prompt import Prompt
from batchinfer.pipeline.scoring import Pooled, Rolling, continuations

from .test_structured import random_model  # noqa: F401 (a fixture)

CONTEXTS = [
    "name: city, name: city, name",
    "name: city, name: city ",
    "name: city, name: city\n",
    "12 12 12 12 12",
    "city",
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=10, logprobs=1),
    SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=10, stop=("12", "e"), min_tokens=2),
    SamplingParams(temperature=1, max_tokens=10, seed=3, n=2),
    SamplingParams(temperature=1, max_tokens=10),
    SamplingParams(temperature=0, max_tokens=10, structured_outputs={"choice": ["name", "city"]}),
    SamplingParams(temperature=0, max_tokens=10, structured_outputs={"regex": "[0-9]{1,6}"}),
]
READS = [
    *(Pooled(way, normalize) for way in ("mean", "last", "cls") for normalize in (True, False)),
    Rolling(),
    *(continuations([" city", "12"], by) for by in ("sum", "tokens")),
]
CONTENTS = st.sampled_from(CONTEXTS).map(lambda context: [context])
PROMPTS = st.one_of(
    st.builds(Prompt, st.just(0), CONTENTS, st.sampled_from(PARAMS), st.integers(0, 1)),
    st.builds(Prompt, st.just(0), CONTENTS, read=st.sampled_from(READS)),
)


@pytest.fixture(scope="module")
def models(random_model: Path) -> tuple[LLM, LLM]:  # noqa: F811
    """One that shares all that it can, in a cache of a few blocks, and one that keeps nothing of others."""
    sharing = LLM(random_model, max_num_seqs=4, kv_cache_tokens=256, block_size=4, max_step_tokens=24, max_model_len=96)
    plain = LLM(
        random_model, max_num_seqs=1, enable_prefix_caching=False, speculative_tokens=0, max_model_len=96, block_size=4
    )
    return sharing, plain


def values(completion: Completion) -> tuple[list[object], list[float]]:
    """Return what must be equal, and numbers whose last bits may differ between batches."""
    scores, logprobs = completion.scores or [], completion.prompt_logprobs or []
    exact = [completion.prompt_token_ids, completion.choice, repr(completion.error)]
    exact += [(one.text, one.token_ids, one.finish_reason) for one in completion.outputs]
    exact += [(one.text, one.token_ids, one.is_greedy) for one in scores] + [len(logprobs)]
    entries = [entry for one in completion.outputs for entry in one.logprobs or []] + [e for e in logprobs if e]
    numbers = [
        *(completion.embedding or []),
        *(value for one in scores for value in (one.logprob, *one.token_logprobs)),
    ]
    return exact, numbers + [entry.logprob for entry in entries]


ALONE: dict[str, tuple[list[object], list[float]]] = {}


@settings(max_examples=12, deadline=None)
@given(st.lists(PROMPTS, min_size=4, max_size=12))
def test_answers_among_others_are_those_alone(models, prompts):
    sharing, plain = models
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    for completion in sharing.run_prompts(numbered):
        key = repr(prompts[completion.index])
        if key not in ALONE:
            ALONE[key] = values(next(iter(list(plain.run_prompts([prompts[completion.index]])))))
        exact, numbers = values(completion)
        assert exact == ALONE[key][0], key
        assert numbers == pytest.approx(ALONE[key][1], abs=1e-4), key
