"""The engine on a device: captured steps, answers of the plain runner, launches that wait for nothing, lack of memory.

Without a GPU the checks run on the pretend device and in Triton's interpreter, at the same sizes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.steps import PackedStep
from torch import Tensor

from batchinfer.ops.graphs import NoGraphs
from batchinfer.request import Finished, Request, SamplingParams
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner
from batchinfer.runner.graph_ladder import Rung
from tests.gpu.random_model import TINY, random_decoder
from tests.gpu.rig import Rig, make_engine, make_rig
from tests.harness import make_engine as make_plain_engine
from tests.harness import run_requests

_LIMITS = StepLimits(12, 48, 160, 16, TINY["vocab_size"])
_NUM_BLOCKS = _LIMITS.max_num_seqs * _LIMITS.table_blocks


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def rig(request) -> Rig:
    return make_rig(request.param)


@pytest.fixture
def runner(rig) -> DeviceRunner:
    return rig.make_runner(random_decoder(TINY, rig.backend, torch.float32), _LIMITS, _NUM_BLOCKS)


def requests(count: int, answer: tuple[int, int] = (3, 24)) -> list[Request]:
    """Return requests of all kinds of sampling; a third needs the host for every token."""
    rng = random.Random(0)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(temperature=0.9, min_p=0.02, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.0, presence_penalty=0.4, frequency_penalty=0.2),
    ]
    return [
        Request(
            number,
            rng.choices(range(3, TINY["vocab_size"]), k=rng.randint(1, 90)),
            kinds[number % len(kinds)],
            rng.randint(*answer),
            key=rng.getrandbits(64),
        )
        for number in range(count)
    ]


# -- answers -------------------------------------------------------------------------------------------------------


def plain_answers(wanted: list[Request]) -> dict[int, Finished]:
    from batchinfer.runner.model_runner import ModelRunner

    decoder = random_decoder(TINY, EagerBackend(torch.device("cpu")), torch.float32)
    runner = ModelRunner(decoder, _NUM_BLOCKS, 16, _LIMITS.max_num_seqs, _LIMITS.max_model_len)
    engine = make_plain_engine(runner, _NUM_BLOCKS, 16, seats=_LIMITS.max_num_seqs, step_tokens=48)
    return run_requests(engine, wanted)


def test_answers_on_interpreted_kernels_are_those_of_the_plain_runner():
    pytest.importorskip("triton")
    rig = make_rig("interpreted")
    limits = _LIMITS._replace(max_num_seqs=3, max_step_tokens=24)
    num_blocks = limits.max_num_seqs * limits.table_blocks
    decoder = random_decoder(TINY, rig.backend, torch.float32)
    runner = rig.make_runner(decoder, limits, num_blocks, NoGraphs())
    wanted = [replace(one, prompt=one.prompt[:20]) for one in requests(3, (2, 3))]
    answers = run_requests(make_engine(runner, limits, num_blocks), wanted)
    for number, expected in plain_answers(wanted).items():
        assert answers[number].token_ids == expected.token_ids, wanted[number].params


@pytest.mark.parametrize("drafts", [0, 3])
def test_answers_are_those_of_the_plain_runner(rig, runner, drafts):
    wanted = requests(50 if rig.is_gpu else 14)
    answers = run_requests(make_engine(runner, _LIMITS, _NUM_BLOCKS, drafts), wanted)
    for number, expected in plain_answers(wanted).items():
        assert answers[number].token_ids == expected.token_ids, wanted[number].params
        assert answers[number].error is None


# -- graphs --------------------------------------------------------------------------------------------------------


def step_of(rung: Rung, runner: DeviceRunner, device: torch.device) -> PackedStep:
    """Return a step that fits the rung with room to spare: random contexts in blocks of their own."""
    rng = random.Random(rung.tokens)
    count = max(1, min(rung.sequences, rung.tokens) - 1)
    most = rung.tokens // count if rung.has_prompts else rung.max_queries
    counts = [rng.randint(1, max(1, min(most, rung.tokens // count))) for _ in range(count)]
    lengths = [rng.randint(counts[i], min(rung.max_length, _LIMITS.max_model_len)) for i in range(count)]
    blocks = torch.randperm(_NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).int()
    runner._state.block_tables_PW[:-1] = blocks.view(_LIMITS.max_num_seqs, -1).to(device)
    starts = torch.tensor([0, *counts]).cumsum(0)

    def ints(values: list[int] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    return PackedStep(
        seats_S=ints(rng.sample(range(_LIMITS.max_num_seqs), count)),
        starts_S=ints([length - own for length, own in zip(lengths, counts, strict=True)]),
        query_starts_X=ints(starts),
        tokens_T=ints([rng.randrange(TINY["vocab_size"]) for _ in range(int(starts[-1]))]),
    )


@torch.inference_mode()
def test_a_replay_of_every_rung_equals_its_eager_step(rig, runner):
    for layer in runner.cache.layers:
        layer.normal_(generator=torch.Generator(rig.device).manual_seed(0))
    for rung in runner.ladder.rungs:
        step = step_of(rung, runner, rig.device)
        tokens = len(step.tokens_T)
        inputs = runner._inputs.views(rung)
        runner._steps.expand_step(step, runner._state, _LIMITS.block_size, inputs)
        runner._body(inputs, rung.tokens).run()
        eager = runner._hidden_TE[:tokens].clone()
        assert eager.isfinite().all()
        runner._hidden_TE.fill_(7.0)
        runner._graphs.replay(rung)
        assert torch.equal(runner._hidden_TE[:tokens], eager), rung


# -- launches ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_waits(rig: Rig) -> Iterator[None]:
    """Make every wait for the device an error, on one."""
    if not rig.is_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WatchedRunner:
    """A runner whose launches may not wait."""

    def __init__(self, rig: Rig, runner: DeviceRunner) -> None:
        self.depth = runner.depth
        self.launches = 0
        self._rig = rig
        self._runner = runner
        self.collect = runner.collect
        self.discard = runner.discard

    def launch(self, plan, constraints):
        self.launches += 1
        with nothing_waits(self._rig):
            return self._runner.launch(plan, constraints)


def test_no_launch_waits_for_the_device(rig, runner):
    wanted = requests(24 if rig.is_gpu else 8)
    run_requests(make_engine(runner, _LIMITS, _NUM_BLOCKS), wanted)  # compiles kernels, and fills pools of memory
    watched = WatchedRunner(rig, runner)
    answers = run_requests(make_engine(watched, _LIMITS, _NUM_BLOCKS), wanted)
    assert watched.launches > len(wanted)
    assert all(answer.error is None for answer in answers.values())


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_steps_are_redone_smaller_when_memory_runs_out():
    rig = make_rig("cuda")
    limits = _LIMITS._replace(max_step_tokens=65536, max_model_len=4096)
    decoder = random_decoder(
        TINY | {"intermediate_size": 65536, "max_position_embeddings": 4096}, rig.backend, torch.float32
    )
    num_blocks = limits.max_num_seqs * limits.table_blocks
    runner = rig.make_runner(decoder, limits, num_blocks, NoGraphs())
    wanted = [
        Request(number, [3 + number] * 4000, SamplingParams(temperature=0.0), 4, key=number) for number in range(12)
    ]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(rig.device).total_memory
    room = torch.cuda.memory_reserved(rig.device) + (1 << 32)  # gates of 8,000 tokens take 4 GiB
    engine = make_engine(runner, limits, num_blocks)
    torch.cuda.set_per_process_memory_fraction(room / total, rig.device)
    try:
        answers = run_requests(engine, wanted)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, rig.device)
    assert all(answer.error is None and len(answer.token_ids) == 4 for answer in answers.values())
    assert engine.stats.preemptions > 0
