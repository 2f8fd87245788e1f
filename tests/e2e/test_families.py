"""Greedy tokens of every family through the whole engine equal transformers', under preemption, hits and chunks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from batchinfer.engine.engine import Engine
from batchinfer.models.weights import load_decoder
from batchinfer.request import Request, SamplingParams
from tests.harness import decoder_engine, never_stop, run_requests
from tests.models.tiny import MODELS, SIZES, build

_ANSWER_TOKENS = 12
_BLOCK_SIZE = 4


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    rng = random.Random(1)
    shared = [rng.randrange(3, SIZES["vocab_size"]) for _ in range(30)]
    prompts = [
        shared[: rng.randrange(30)] + [rng.randrange(3, SIZES["vocab_size"]) for _ in range(rng.randrange(1, 30))]
        for _ in range(12)
    ]
    decoder = load_decoder(tmp_path)
    answers = []
    for caching, step_tokens in ((True, 16), (False, 1000)):
        engine = decoder_engine(decoder, 40, seats=8, caching=caching, step_tokens=step_tokens)
        answers.append(_run(engine, prompts))
        assert engine.stats.preemptions > 0
        assert (engine.stats.prompt_tokens_reused > 0) == caching
    assert answers[0] == answers[1]
    for prompt, answer in zip(prompts, answers[0], strict=True):
        if name == "phi3-longrope" and len(prompt + answer) <= 32:
            continue  # transformers takes other factors for short sequences, and changes them as a sequence grows
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


def _run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS)
    requests = [Request(i, ids, params, _ANSWER_TOKENS, stop_check=never_stop) for i, ids in enumerate(prompts)]
    finished = run_requests(engine, requests)
    assert all(answer.error is None for answer in finished.values())
    return [finished[i].token_ids for i in range(len(prompts))]
