"""The sampler against transformers' own processors, where the two mean the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchinfer.engine.plan import Join
from batchinfer.request import SamplingParams
from batchinfer.runner.sampler import Sampler
from tests.runner.test_sampler import Batch, request


def transformers_kept(params: SamplingParams, ids: list[int], row: torch.Tensor) -> torch.Tensor:
    processors = [TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    for processor in processors:
        row = processor(torch.tensor([ids]), row)
    return row.softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=12),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02),
    ],
)
def test_filters_keep_what_transformers_keep(params):
    """Many keys on one row: exactly the tokens of transformers' support appear, about as often as they should."""
    draws, vocab = 4000, 400
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)) * 2
    expected = transformers_kept(params, [1, 2, 3], row)
    batch = Batch([request(params, key=key) for key in range(draws)], vocab)
    counts = np.bincount(batch.step(row.expand(draws, -1)).tokens, minlength=vocab)
    assert counts[(expected == 0).numpy()].sum() == 0
    share = expected.numpy()
    assert np.all(np.abs(counts - draws * share) < 5 * np.sqrt(draws * share * (1 - share)) + 3)


def test_penalties_and_bias_equal_transformers():
    vocab = 80
    generator = torch.Generator().manual_seed(9)
    for case in range(20):
        prompt = torch.randint(0, vocab, (6,), generator=generator).tolist()
        output = torch.randint(0, vocab, (5,), generator=generator).tolist()
        logits = torch.randn(1, vocab, generator=generator) * 3
        history = torch.tensor([prompt + output])
        penalised = RepetitionPenaltyLogitsProcessor(1.4)(history, logits.clone())
        biased = SequenceBiasLogitsProcessor([[[3], 2.5], [[70], -4.0]])(history, logits.clone())
        banned = NoBadWordsLogitsProcessor([[output[-1], int(logits.argmax())], [5]])(history, logits.clone())
        for params, words, wanted in (
            (SamplingParams(temperature=0.0, repetition_penalty=1.4), (), penalised),
            (SamplingParams(temperature=0.0, logit_bias={3: 2.5, 70: -4.0}), (), biased),
            (SamplingParams(temperature=0.0), ((output[-1], int(logits.argmax())), (5,)), banned),
        ):
            sampler = Sampler(1, vocab)
            sampler.seat_sequence(Join.of_request(0, request(params, prompt, bad_words=words), tuple(output)))
            edited = logits.clone()
            result = sampler.sample(edited, np.array([0]), np.array([11]))
            assert result.tokens == [int(wanted.argmax())], case
            torch.testing.assert_close(edited, wanted)
