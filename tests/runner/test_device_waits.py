"""Nothing in a launch waits for the device, or copies from memory that is not pinned: a run on torch's meta device.

Tensors there have no values, so reading one raises, as does a shape that depends on values; what else would make a host
wait, a copy between host and device other than through the streams, is refused by a dispatch mode.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchinfer.engine.plan import Copy, PromptRead
from batchinfer.models.weights import load_decoder
from batchinfer.ops.graphs import NoGraphs
from batchinfer.ops.staging import StagingRing
from batchinfer.ops.streams import DeviceMemory
from batchinfer.runner.device_inputs import StepLimits
from batchinfer.runner.device_runner import DeviceRunner
from tests.models.tiny import SIZES, build
from tests.runner.test_device_steps import BLOCK, SEATS, Server, first_plan, generating, odd_ones
from tests.runner.test_model_runner import greedy

META = torch.device("meta")


class MetaBackend(EagerBackend):
    """The eager backend without what reads a step on the host."""

    def __init__(self) -> None:
        super().__init__(META)

    def prepare(self, step, kv, attention):
        return None

    def rope_kv_write(self, q, k, v, cos_sin, kv, index):
        pass

    def paged_attention(self, q, kv, index, rule, out=None):
        return torch.empty_like(q)


class Zeros:
    def __init__(self, source: Tensor) -> None:
        self._source = source

    def wait(self) -> Tensor:
        return torch.zeros(self._source.shape, dtype=self._source.dtype)


class MetaStreams:
    """Streams that copy nothing; what comes back is zeros."""

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def upload(self, source: Tensor, target: Tensor) -> None:
        assert source.device.type == "cpu" and target.device.type == "meta" and source.shape == target.shape

    def download(self, source: Tensor) -> Zeros:
        assert source.device.type == "meta"
        return Zeros(source)

    def synchronize(self) -> None:
        raise AssertionError("the host waits")

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0, 0)

    def reset_peak(self) -> None:
        pass


class NoCopies(TorchDispatchMode):
    """Refuses ops between host and device. Numbers of the host may be arguments: a kernel takes them along."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor) and one.dim()]
        devices = {one.device.type for one in tensors}
        assert len(devices) < 2, f"{func} copies between host and device"
        return result


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder, num_hidden_layers=1)
    return load_decoder(folder, backend=MetaBackend(), staging=StagingRing(MetaStreams(), META))


@pytest.fixture
def runner(decoder):
    limits = StepLimits(SEATS, 200, 128, BLOCK, SIZES["vocab_size"])
    runner = DeviceRunner(decoder, MetaStreams(), NoGraphs(), limits, 200)
    ticket = runner.launch(first_plan(greedy([5, 6])))  # constants that are made once
    runner.collect(ticket)
    return runner


def test_no_step_waits_whatever_its_requests_ask_for(runner):
    requests = [replace(one, max_tokens=3) for one in generating(14) + odd_ones(100)]
    with NoCopies():
        answers = Server(runner, depth=1).serve(requests)
    assert answers.keys() == {one.request_id for one in requests}
    assert sum(one.failure is not None for one in answers.values()) < 12


@pytest.mark.parametrize("kind", [{"score_from": 1}, {"pooling": "mean"}])
def test_prompts_are_read_without_a_wait(runner, kind):
    params = replace(greedy([1]).params, prompt_logprobs=3)
    requests = [replace(greedy([5, 6, 7, 8], number), **kind, params=params) for number in range(2)]
    reads = (PromptRead(0, 0, 3), PromptRead(1, 0, 3))
    with NoCopies():
        result = runner.collect(runner.launch(replace(first_plan(*requests), reads=reads)))
    assert len(result.readings) == 2 and all(one.failure is None for one in result.readings)


def test_blocks_are_copied_without_a_wait(runner):
    with NoCopies():
        runner.collect(runner.launch(replace(first_plan(greedy([5, 6])), copies=(Copy(0, 3), Copy(3, 4)))))


def pageable(values) -> Tensor:
    """Upload as a careless caller would: from memory that is not pinned, while the host waits."""
    return torch.from_numpy(values).to("meta")


def test_a_wait_would_be_noticed(runner, monkeypatch):
    stage = runner._sampler.seats._penalties
    apply = stage.apply
    monkeypatch.setattr(stage, "apply", lambda logits, rows, seats, upload: apply(logits, rows, seats, pageable))
    request = greedy([5, 6], repetition_penalty=1.5)
    with NoCopies(), pytest.raises(AssertionError, match="copies between host and device"):
        runner.launch(first_plan(request))
    with pytest.raises(RuntimeError, match="meta"):
        runner._hidden_TE.sum().item()
