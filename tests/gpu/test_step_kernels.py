"""Kernels of steps on a device: the tests of tests/kernels/test_step_kernels.py there, and logprobs with a tolerance.

Weights are a device's own exp, which differs from the host's in the last bits: a token could differ if its random
number hit a border between two tokens to seven digits, which those of these seeds do not.
"""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels.eager.step_kernels import EagerStepKernels

from tests.gpu.rig import make_rig
from tests.kernels import test_step_kernels as on_cpu
from tests.kernels.on_device import OnDevice
from tests.kernels.seats import GREEDY, ints


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def steps(request):
    rig = make_rig(request.param)
    return OnDevice(rig.backend.steps, rig.device.type)


@pytest.mark.parametrize(("vocab", "step"), [(1, 0.0), (33, 0.5), (3001, 0.5), (50_257, 0.0), (151_936, 0.0)])
def test_tokens_are_those_of_the_hosts_sampler(steps, vocab, step):
    on_cpu.test_tokens_are_those_of_the_hosts_sampler(steps, vocab, step)


def test_ties_masks_and_targets(steps):
    on_cpu.test_greedy_takes_the_lowest_of_equals(steps)
    on_cpu.test_only_targets_get_a_last_token(steps)
    for seat in (GREEDY, on_cpu.SEATS["plain"], on_cpu.SEATS["all"]):
        on_cpu.test_masked_tokens_are_never_drawn(steps, seat)


@pytest.mark.parametrize("vocab", [33, 3001, 151_936])
def test_logprobs_are_those_of_torchs_ops(steps, vocab):
    logits_NV = on_cpu.random_logits(5, vocab, vocab)
    tokens_N = ints([0, vocab - 1, 1, 2, vocab // 2])
    for best, named_NC in ((0, None), (5, None), (3, ints([[2, 0, -1, -1]] * 5))):
        mine = steps.gather_logprobs(logits_NV, tokens_N, best, named_NC)
        theirs = EagerStepKernels().gather_logprobs(logits_NV, tokens_N, best, named_NC)
        assert torch.equal(mine.ids_NC, theirs.ids_NC)
        torch.testing.assert_close(mine.own_N, theirs.own_N, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine.values_NC, theirs.values_NC, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("appended", [0, 300])
def test_updates_reach_the_state(steps, appended):
    on_cpu.test_updates_reach_the_state(steps, appended, joining=9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding", [(0, 0), (5, 300)])
def test_steps_expand_with_padding(steps, padding, dtype):
    on_cpu.test_steps_expand_with_padding(steps, 16, padding, dtype)
