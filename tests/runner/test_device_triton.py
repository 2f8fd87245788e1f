"""The device runner on Triton's kernels, in the interpreter: a few steps, one ahead, with the plain runner's tokens."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend

from batchinfer.models.weights import load_decoder
from tests.harness import decoder_runner
from tests.kernels.conftest import make_interpreted_backend
from tests.models.tiny import build
from tests.runner.devices import CONTEXT, device_runner
from tests.runner.test_device_steps import BLOCK, SEATS, Server
from tests.runner.test_model_runner import greedy

pytest.importorskip("triton")


def test_tokens_are_those_of_the_plain_runner(tmp_path):
    build("llama", tmp_path, num_hidden_layers=1, vocab_size=32)
    requests = [
        greedy([5, 6, 7, 8, 9], 1, max_tokens=3),
        greedy([11, 12], 2, max_tokens=2, temperature=0.8, top_p=0.9, logprobs=2),
        greedy([13], 3, max_tokens=3, repetition_penalty=1.4),
    ]
    plain = load_decoder(tmp_path, backend=EagerBackend(torch.device("cpu")))
    num_blocks = SEATS * CONTEXT // BLOCK
    expected = Server(decoder_runner(plain, num_blocks, BLOCK, SEATS), depth=0).serve(requests)
    decoder = load_decoder(tmp_path, backend=make_interpreted_backend())
    runner = device_runner(decoder, num_blocks, BLOCK, seats=SEATS, graphs=False)
    found = Server(runner, depth=1).serve(requests)
    assert {number: one.output for number, one in found.items()} == {n: one.output for n, one in expected.items()}
    for entry, same in zip(expected[2].logprobs, found[2].logprobs, strict=True):
        assert [token for token, _ in same.top] == [token for token, _ in entry.top]
        assert same.logprob == pytest.approx(entry.logprob, abs=1e-4)
