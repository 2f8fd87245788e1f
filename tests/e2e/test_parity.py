"""Greedy tokens of the real model equal transformers': random admission, preemption, prefix cache, chunks.

transformers checks by one forward pass over prompt and answer: if at every position of the answer its arg-max is the
next token, its own greedy answer is this one (by induction over the positions).
"""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import Scheduler
from batchinfer.io.fetch import ModelFiles
from batchinfer.pipeline.load import assemble
from batchinfer.request import Request, SamplingParams
from batchinfer.spec import EngineSpec, FakeSpec
from batchinfer.text.tokenizer import load_tokenizer
from tests.harness import expect_short_answers, never_stop, run_requests
from tests.models.smollm2 import in_transformers
from tests.sampling import random_sample

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]
_PROMPTS = Path(__file__).parents[2] / "jobs" / "data" / "quickstart.parquet"
_ANSWER_TOKENS = 16


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> LlamaForCausalLM:
    return in_transformers(smollm2_gguf)


@pytest.fixture(scope="module")
def prompts(smollm2_gguf: Path, pytestconfig: pytest.Config) -> list[list[int]]:
    """50 real prompts of mixed length, or in a sample 12."""
    texts = pq.read_table(_PROMPTS).column("prompt").to_pylist()
    random.Random(4).shuffle(texts)
    if not pytestconfig.getoption("--all"):
        texts = random_sample(texts[:50], 12, "prompts")
    tokenizer = load_tokenizer(smollm2_gguf)
    ids = tokenizer.encode_batch(texts[:50], add_special_tokens=True)
    assert max(map(len, ids)) > 4 * min(map(len, ids))
    return [list(entry) for entry in ids]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]], reference: LlamaForCausalLM) -> list[tuple[list[float], list[int]]]:
    """Of each prompt, for every token but the first: its logprob, and the most likely token in its place."""
    found = []
    for ids in prompts:
        with torch.inference_mode():
            logprobs_TV = torch.log_softmax(reference(torch.tensor([ids])).logits[0, :-1], -1)
        logprobs_T = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append((logprobs_T.tolist(), logprobs_TV.argmax(-1).tolist()))
    return found


def engine_answers(
    path: Path, prompts: list[list[int]], engine: EngineSpec, preempt: bool = True
) -> tuple[list[list[int]], Engine]:
    assembly = assemble(engine, ModelFiles(path, "test"), None, FakeSpec(), None)
    loop = Engine(
        Scheduler(assembly.pool, engine.max_num_seqs, engine.max_step_tokens, max_draft_rows=128), assembly.runner
    )
    if preempt:
        expect_short_answers(loop.scheduler)
    params = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS)
    waiting = [Request(i, ids, params, _ANSWER_TOKENS, stop_check=never_stop) for i, ids in enumerate(prompts)]
    rng = random.Random(0)
    answers: dict[int, list[int]] = {}
    while waiting or loop.has_work:
        while waiting and (not loop.has_work or rng.random() < 0.5):
            loop.add(waiting.pop(0))
        for finished in loop.step().finished:
            assert finished.error is None
            answers[finished.request.request_id] = finished.token_ids
        loop.scheduler.check_integrity()
    return [answers[i] for i in range(len(prompts))], loop


def assert_greedy(reference: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> None:
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer


def test_smollm2_equals_transformers(smollm2_gguf: Path, prompts: list[list[int]], reference: LlamaForCausalLM) -> None:
    longest = max(map(len, prompts)) + _ANSWER_TOKENS
    kv_tokens = max(16 * len(prompts), 16 * -(-longest // 16))
    options = {"dtype": "float32", "kv_cache_tokens": kv_tokens, "max_num_seqs": 16}
    cached, loop = engine_answers(smollm2_gguf, prompts, EngineSpec(**options, max_step_tokens=64))
    assert loop.stats.preemptions > 0
    for prompt, answer in zip(prompts, cached, strict=True):
        assert_greedy(reference, prompt, answer)
    whole, loop = engine_answers(
        smollm2_gguf, prompts, EngineSpec(**options, max_step_tokens=2048, enable_prefix_caching=False)
    )
    assert loop.stats.preemptions > 0 and loop.stats.prompt_tokens_reused == 0
    assert whole == cached


@pytest.mark.parametrize("max_step_tokens", [2048, 48])
def test_prompt_logprobs_equal_transformers(
    smollm2_gguf: Path,
    prompts: list[list[int]],
    expected: list[tuple[list[float], list[int]]],
    plain_torch: bool,
    max_step_tokens: int,
) -> None:
    """All prompts, with the prefix cache cold and hot, whole and in chunks."""
    tolerance = 1.5e-4 if plain_torch else 1e-4  # its sums are in another order than transformers', and no better
    engine = EngineSpec(dtype="float32", kv_cache_tokens=6000, max_num_seqs=16, max_step_tokens=max_step_tokens)
    assembly = assemble(engine, ModelFiles(smollm2_gguf, "test"), None, FakeSpec(), None)
    loop = Engine(
        Scheduler(assembly.pool, engine.max_num_seqs, engine.max_step_tokens, max_draft_rows=128), assembly.runner
    )
    params = SamplingParams(temperature=0, prompt_logprobs=2)
    for turn in range(2):  # the second finds blocks of the first
        # every other one also answers; its first positions are not asked for, and may come from the cache
        requests = []
        for number, ids in enumerate(prompts):
            score_from, answers = (1, 0) if number % 2 else (len(ids) // 2, 4)
            requests.append(Request(number, ids, params, answers, score_from=score_from))
        done = run_requests(loop, requests)
        for number, (ids, (logprobs, likeliest)) in enumerate(zip(prompts, expected, strict=True)):
            entries = done[number].prompt_logprobs
            assert entries is not None and len(entries) == len(ids)
            first = done[number].request.score_from
            assert first is not None and entries[:first] == [None] * first
            for place in range(first, len(ids)):
                entry = entries[place]
                assert entry is not None and entry.token_id == ids[place]
                assert abs(entry.logprob - logprobs[place - 1]) < tolerance, (turn, number, place)
                assert (entry.logprob == entry.top[0][1]) == (likeliest[place - 1] == ids[place])
    assert loop.stats.prompt_tokens_reused > 0


def test_smollm2_with_prefix_hits_and_chunks_equals_transformers(
    smollm2_gguf: Path, prompts: list[list[int]], reference: LlamaForCausalLM
) -> None:
    """A long shared prefix: hits in the same step, hits after preemption, chunks that end inside a prompt."""
    shared = (prompts[0] + prompts[1])[:100]
    extended = [shared + ids[:40] for ids in prompts[:12]]
    options = {"dtype": "float32", "kv_cache_tokens": 480, "max_num_seqs": 8}
    chunked, loop = engine_answers(smollm2_gguf, extended, EngineSpec(**options, max_step_tokens=40))
    assert loop.stats.preemptions > 0 and loop.stats.prompt_tokens_reused > 500
    whole, _ = engine_answers(smollm2_gguf, extended, EngineSpec(**options, max_step_tokens=2048))
    assert whole == chunked
    for prompt, answer in zip(extended, chunked, strict=True):
        assert_greedy(reference, prompt, answer)
