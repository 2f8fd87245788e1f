"""Tiny decoders on the Triton kernels, in the interpreter: the logits of the eager backend."""

from __future__ import annotations

import pytest
import torch

from batchinfer.models.weights import load_decoder
from tests.models.tiny import Paged, build

# sequence → tokens of each step: prompts, a chunk after a prefix beside decodes, decodes
STEPS = [
    {0: [5, 6, 7, 8, 9, 11, 12, 13, 4], 1: [20, 21]},
    {0: [9], 1: [30, 31, 32, 33, 34], 2: [40]},
    {2: [41], 0: [10]},
]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_logits_are_those_of_the_eager_backend(eager, interpreted, tmp_path, family):
    """qwen3 norms its queries and keys; gemma2 has windows, soft caps, norms after each branch, and gelu."""
    build(family, tmp_path, num_hidden_layers=2)
    one, other = (Paged(load_decoder(tmp_path, backend=backend), sequences=3) for backend in (eager, interpreted))
    for work in STEPS:
        expected = one.step(work)
        assert expected.std() > 0.1
        torch.testing.assert_close(other.step(work), expected, atol=1e-4, rtol=1e-4)
    for kept, cache in zip(one.cache, other.cache, strict=True):
        torch.testing.assert_close(cache, kept, atol=1e-4, rtol=1e-4, equal_nan=True)
