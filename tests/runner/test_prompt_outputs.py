"""Prompts that are read: logprobs equal transformers' log-softmax, embeddings its hidden states, in whatever steps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchinfer.engine.engine import Engine
from batchinfer.models.weights import load_decoder
from batchinfer.request import Finished, Request, SamplingParams
from tests.harness import decoder_engine, run_requests
from tests.models.tiny import SIZES, build

VOCAB = SIZES["vocab_size"]
FAMILIES = ["llama", "llama-tied", "qwen3", "mistral", "gemma2", "gemma3", "granite", "olmo2", "phi3"]
CLOSE = {"rel": 0, "abs": 2e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = build(request.param, folder)
    return load_decoder(folder), reference


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    reference = build("llama", folder)
    return load_decoder(folder), reference


def prompts_of(count: int, longest: int = 60) -> list[list[int]]:
    generator = np.random.default_rng(count)
    shared = generator.integers(3, VOCAB, 30).tolist()
    return [
        shared[: generator.integers(0, 31)] + generator.integers(3, VOCAB, generator.integers(1, longest - 30)).tolist()
        for _ in range(count)
    ]


def run(engine: Engine, requests: list[Request]) -> list[Finished]:
    """Finished requests in the order of `requests`."""
    finished = run_requests(engine, requests)
    return [finished[request.request_id] for request in requests]


def scoring(prompts, max_tokens=0, score_from=1, top=3) -> list[Request]:
    params = SamplingParams(temperature=0, prompt_logprobs=top, logprobs=top)
    return [Request(i, prompt, params, max_tokens, score_from=score_from) for i, prompt in enumerate(prompts)]


@torch.inference_mode()
def log_softmax(reference, prompt: list[int]) -> torch.Tensor:
    return torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), -1)


def assert_scores(entries, prompt: list[int], expected_TV: torch.Tensor, score_from: int = 1) -> None:
    assert len(entries) == len(prompt) and entries[:score_from] == [None] * min(score_from, len(prompt))
    for place in range(score_from, len(prompt)):
        entry, row_V = entries[place], expected_TV[place - 1]
        assert entry.token_id == prompt[place]
        assert entry.logprob == pytest.approx(float(row_V[entry.token_id]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row_V.topk(len(entry.top)).values.tolist(), abs=1e-4)
        assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob, "one tensor gives both, bit for bit"


def test_logprobs_equal_transformers(family):
    decoder, reference = family
    prompts = prompts_of(12)
    for answer, prompt in zip(
        run(decoder_engine(decoder, 400, seats=4, step_tokens=50), scoring(prompts)), prompts, strict=True
    ):
        assert_scores(answer.prompt_logprobs, prompt, log_softmax(reference, prompt))
        assert answer.token_ids == [] and answer.finish_reason == "length"


def test_embeddings_equal_transformers(family):
    decoder, reference = family
    kinds = ["mean", "last", "cls"]
    requests = [
        Request(i, prompt, SamplingParams(), 0, pooling=kinds[i % 3]) for i, prompt in enumerate(prompts_of(12))
    ]
    for budget, blocks in ((1000, 400), (9, 30)):
        for answer in run(decoder_engine(decoder, blocks, seats=4, step_tokens=budget), requests):
            prompt = answer.request.prompt
            with torch.inference_mode():
                states = reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double()
            pooled = {"mean": states.sum(0), "last": states[-1], "cls": states[0]}[answer.request.pooling]
            assert list(answer.hidden) == pytest.approx(pooled.tolist(), rel=1e-4, abs=1e-3)


def test_readings_are_the_same_bits_however_steps_are_cut(tiny_llama):
    """Cache cold, hot or off; whole or in chunks; one by one or together; preempted or not: the same values."""
    decoder, reference = tiny_llama
    prompts = prompts_of(16)
    # an answer that may end early is admitted by its expected length, and preempted if it is longer
    requests = [replace(request, stop_check=lambda token_id: False) for request in scoring(prompts, max_tokens=6)]
    expected = run(decoder_engine(decoder, 400, seats=1, step_tokens=1000, caching=False), requests)
    for answer, prompt in zip(expected, prompts, strict=True):
        assert_scores(answer.prompt_logprobs, prompt, log_softmax(reference, prompt))
    hot = decoder_engine(decoder, 400, seats=8, step_tokens=1000)
    others = {
        "cold": run(hot, requests),
        "hot": run(hot, requests),
        "off": run(decoder_engine(decoder, 400, seats=8, step_tokens=1000, caching=False), requests),
        "chunked": run(decoder_engine(decoder, 400, seats=8, step_tokens=9), requests),
        "one by one": run(decoder_engine(decoder, 400, seats=1, step_tokens=7), requests),
    }
    tight = decoder_engine(decoder, 20, seats=8, step_tokens=24)
    others["preempted"] = run(tight, requests)
    assert tight.stats.preemptions > 0
    for how, answers in others.items():
        for answer, right in zip(answers, expected, strict=True):
            assert answer.token_ids == right.token_ids, how
            ours, theirs = answer.prompt_logprobs[1:], right.prompt_logprobs[1:]
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], **CLOSE)
            assert [[token for token, _ in entry.top] for entry in ours] == [
                [token for token, _ in entry.top] for entry in theirs
            ], how


def test_reading_changes_no_sampled_token(tiny_llama, plain_torch):
    decoder, _ = tiny_llama
    prompts = prompts_of(16)
    plain = [Request(i, p, SamplingParams(temperature=0, logprobs=3), 9) for i, p in enumerate(prompts)]
    for seats in (1, 8):
        read = run(
            decoder_engine(decoder, 400, seats=seats, step_tokens=40, caching=False), scoring(prompts, max_tokens=9)
        )
        bare = run(decoder_engine(decoder, 400, seats=seats, step_tokens=40, caching=False), plain)
        assert [one.token_ids for one in read] == [one.token_ids for one in bare]
        ours, theirs = ([entry for one in answers for entry in one.logprobs] for answers in (read, bare))
        if plain_torch:
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], **CLOSE)
        else:
            assert ours == theirs


def test_continuations_of_a_shared_context_score_as_alone(tiny_llama):
    """The context is computed once; each continuation reads its own rows."""
    decoder, reference = tiny_llama
    context = list(range(30, 54))
    prompts = [[*context, *tail] for tail in prompts_of(9, 40)]
    engine = decoder_engine(decoder, 400, seats=8, step_tokens=1000)
    for answer, prompt in zip(run(engine, scoring(prompts, score_from=24)), prompts, strict=True):
        assert_scores(answer.prompt_logprobs, prompt, log_softmax(reference, prompt), score_from=24)
    # those of the first step whole blocks; those that no longer fit beside 128 tokens of it up to their first row
    assert engine.stats.prompt_tokens_reused == 3 * 20 + 5 * 23


def test_slices_change_nothing_and_bound_the_logits(tiny_llama, monkeypatch):
    decoder, _ = tiny_llama
    prompts = prompts_of(10)
    whole = run(decoder_engine(decoder, 400, seats=8, step_tokens=1000, caching=False), scoring(prompts))
    shapes = []
    monkeypatch.setattr("batchinfer.runner.model_runner._READ_LOGITS_BYTES", 4 * VOCAB * 7)
    real = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: shapes.append(len(hidden)) or real(hidden))
    sliced = run(decoder_engine(decoder, 400, seats=8, step_tokens=1000, caching=False), scoring(prompts))
    assert max(shapes) == 7 and sum(shapes) == sum(len(prompt) - 1 for prompt in prompts)
    for one, other in zip(sliced, whole, strict=True):
        ours, theirs = one.prompt_logprobs[1:], other.prompt_logprobs[1:]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], **CLOSE)


def test_a_poisoned_prompt_ends_alone(tiny_llama):
    """An embedding that is not a number spoils its own sequence, scored or pooled, and no other."""
    decoder, reference = tiny_llama
    prompts = [[token for token in prompt if token != 4] for prompt in prompts_of(8)]
    expected = [log_softmax(reference, prompt) for prompt in prompts]
    spoilt = [[*prompt[:3], 4, *prompt[3:]] for prompt in prompts]
    requests = scoring([entry for pair in zip(prompts, spoilt, strict=True) for entry in pair])
    requests += [Request(50, spoilt[0], SamplingParams(), 0, pooling="mean")]
    weight = decoder.embedding.matrix.values_OI
    before = weight[4].clone()
    try:
        with torch.no_grad():
            weight[4] = math.nan
        answers = run(decoder_engine(decoder, 400, seats=4, step_tokens=30), requests)
    finally:
        with torch.no_grad():
            weight[4] = before
    for answer in answers:
        if 4 in answer.request.prompt:
            assert answer.error is not None and "not finite" in str(answer.error)
        else:
            number = prompts.index(answer.request.prompt)
            assert_scores(answer.prompt_logprobs, prompts[number], expected[number])
