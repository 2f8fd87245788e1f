"""Sizes on a device of scripted memory: they add up, and a device that is too small names the setting to lower."""

from __future__ import annotations

import gc
import json
import re
import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchinfer import LLM, SamplingParams
from batchinfer.errors import ModelError
from batchinfer.ops.devices import BACKENDS
from batchinfer.ops.out_of_memory import is_out_of_memory, room_for
from batchinfer.ops.pretend import PretendStreams, ReplayedGraphs
from batchinfer.ops.streams import DeviceMemory
from batchinfer.runner import memory
from batchinfer.runner.memory import BlockSize, DeviceUse, measure_use, size_kv_cache
from batchinfer.spec import EngineSpec
from tests.job.doubles import job, rows_of_output, run
from tests.models.tiny import build, write_word_tokenizer
from tests.runner.devices import both_decoders, device_runner

MIB = 1 << 20


class Device:
    """Memory of a device with an allocator that keeps what it once had, until it is told to give it back."""

    def __init__(self, total: int, weights: int) -> None:
        self.total = total
        self.used = weights
        self.reserved = self.peak = weights
        self.outside = 0  # of the driver

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.total - self.reserved - self.outside, self.reserved, self.peak)

    def allocate(self, num_bytes: int) -> None:
        if self.used + num_bytes + self.outside > self.total:
            raise torch.OutOfMemoryError("out of memory\nand advice")
        self.used += num_bytes
        self.reserved = max(self.reserved, self.used)
        self.peak = max(self.peak, self.reserved)

    def give_back(self) -> None:
        self.reserved = self.peak = self.used


class DeviceStreams(PretendStreams):
    def __init__(self, device: Device) -> None:
        super().__init__(device.memory)
        self.device = device

    def reset_peak(self) -> None:
        self.device.give_back()


class ScriptedRunner:
    """Runner that takes 10 MiB for as long as it lives, 30 in its largest step, and in each graph of the driver's 2."""

    def __init__(self, device: Device, rungs: int) -> None:
        self.device = device
        device.allocate(10 * MIB)
        self.ladder = type("Ladder", (), {"rungs": list(range(rungs)), "largest": [0, 1, 2]})
        weakref.finalize(self, device.allocate, -10 * MIB)

    def run_largest_step(self) -> None:
        self.device.allocate(30 * MIB)
        self.device.allocate(-30 * MIB)

    def capture_graphs(self, rungs: list[int]) -> None:
        self.device.allocate(50 * MIB)  # the runner's own: they end with it
        self.device.outside += 2 * MIB * len(rungs)
        weakref.finalize(self, self._end, self.device, 2 * MIB * len(rungs))

    @staticmethod
    def _end(device: Device, outside: int) -> None:
        device.allocate(-50 * MIB)
        device.outside -= outside


def _measure(total: int, rungs: int = 43) -> tuple[DeviceUse, Device]:
    device = Device(total, weights=100 * MIB)
    return measure_use(lambda blocks: ScriptedRunner(device, rungs), DeviceStreams(device), EngineSpec()), device


def test_what_steps_and_graphs_take_is_measured_and_given_back():
    use, device = _measure(1100 * MIB)
    assert use.weights == 100 * MIB
    assert use.step == 40 * MIB
    # tensors beyond what the step had left behind, the driver's memory of three graphs, and that of forty more
    assert use.graphs == 20 * MIB + 6 * MIB + 80 * MIB
    assert use.spare == 40 * MIB
    assert use.left == 1000 * MIB - use.step - use.graphs - use.spare
    assert device.memory() == DeviceMemory(1000 * MIB, 100 * MIB, 100 * MIB)


@pytest.mark.parametrize("total", [101, 115, 130, 145, 155])
def test_a_step_that_does_not_fit_names_the_settings_to_lower(total):
    with pytest.raises(ModelError, match=r"a step of 2048 tokens and 256 .*engine\.max_step_tokens or engine\.max_num"):
        _measure(total * MIB)


@pytest.mark.parametrize("total", range(170, 400, 10))
def test_no_size_is_negative(total):
    use, _ = _measure(total * MIB)
    assert min(use) >= 0
    assert use.left == 0 or sum(use) == total * MIB


USE = DeviceUse(weights=100 * MIB, step=40 * MIB, graphs=6 * MIB, spare=4 * MIB, left=50 * MIB)
BLOCK = BlockSize(tokens=16, num_bytes=MIB)


@pytest.mark.parametrize(
    ("settings", "context", "blocks"),
    [
        ({}, 1 << 20, 49),  # one block belongs to no sequence
        ({"max_num_seqs": 3}, 100, 3 * 7),
        ({"kv_cache_tokens": 784}, 1 << 20, 49),
        ({"kv_cache_tokens": 50}, 1 << 20, 3),
    ],
)
def test_the_cache_gets_what_is_left_as_far_as_the_seats_can_use_it(settings, context, blocks):
    assert size_kv_cache(USE, BLOCK, EngineSpec(**settings), context) == blocks


def test_a_cache_that_does_not_fit_says_what_would():
    with pytest.raises(ModelError, match=r"cache of 800 tokens takes 0\.05 GiB, and weights 0\.10 GiB.*: 784 tokens"):
        size_kv_cache(USE, BLOCK, EngineSpec(kv_cache_tokens=800), 1 << 20)
    with pytest.raises(ModelError, match=r"no room for a KV cache .*: lower engine\.max_step_tokens or"):
        size_kv_cache(USE._replace(left=2 * MIB), BLOCK, EngineSpec(), 1 << 20)
    with pytest.raises(ModelError, match=r"40 tokens holds no block of 64: lower engine\.block_size"):
        size_kv_cache(USE, BLOCK._replace(tokens=64), EngineSpec(kv_cache_tokens=40, block_size=64), 1 << 20)


def test_a_trial_runner_is_gone_once_nobody_holds_it(tmp_path):
    """Its graphs hold the device's memory: a cycle of references would keep that until the collector comes by."""
    build("llama", tmp_path, num_hidden_layers=2)
    runner = device_runner(both_decoders(tmp_path)[1], 3)
    runner.run_largest_step()
    gone = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert gone() is None
    finally:
        gc.enable()


@pytest.fixture
def model(tmp_path, monkeypatch):
    build("llama", tmp_path, num_hidden_layers=2)
    write_word_tokenizer(tmp_path)
    monkeypatch.setitem(BACKENDS, "pretend", ("tests.ops.pretended",))
    return tmp_path


def test_a_model_is_loaded_on_a_device_and_answers_as_on_the_host(model, monkeypatch, capfd):
    device = Device(300 * MIB, weights=100 * MIB)
    monkeypatch.setattr(memory, "make_streams", lambda _: DeviceStreams(device))
    prompts, params = [[5, 6, 7, 5, 6, 7, 5], [8, 9], [3] * 20], SamplingParams(temperature=0.8, max_tokens=12, seed=3)

    def answers(**options):
        llm = LLM(model, max_num_seqs=4, max_step_tokens=32, **options)
        return llm, [one.outputs[0].token_ids for one in llm.generate(prompts, params)]

    llm, found = answers(device="pretend")
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"device memory"' in line]
    assert said[0]["weights"] == "0.10 GiB" and said[0]["spare"] == "0.01 GiB"
    assert isinstance(llm._engine._runner._graphs, ReplayedGraphs) and llm._engine._runner._graphs.replays
    assert len(llm._engine.scheduler.pool.blocks) == 4 * 128 // 16
    assert found == answers(device=list(BACKENDS)[-2])[1]
    with pytest.raises(ModelError, match=r"would fit; lower engine\.kv_cache_tokens"):
        answers(device="pretend", kv_cache_tokens=10_000_000)


def test_a_job_on_a_device_that_runs_out_of_memory_goes_on_in_smaller_steps(model, monkeypatch, capfd, tmp_path):
    texts = [" ".join(f"w{3 + (7 * row + n) % 90}" for n in range(40)) for row in range(6)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    settings = {"device": "pretend", "max_num_seqs": 4, "max_step_tokens": 64, "kv_cache_tokens": 512}

    def rows(name: str, most_tokens: int) -> list[dict]:
        llm = LLM(model, **settings)
        runner = llm._engine._runner
        decoder = runner._decoder
        compute = decoder.forward

        def forward(inputs, caches):
            if inputs.query_starts_X[-1] > most_tokens:
                raise RuntimeError("CUDA out of memory. Tried\nto allocate")
            return compute(inputs, caches)

        freed = []
        monkeypatch.setattr(decoder, "forward", forward)
        monkeypatch.setattr(runner._streams, "reset_peak", lambda: freed.append(1))
        sampling = {"temperature": 0.9, "max_tokens": 12, "ignore_eos": True}
        place = {"path": str(tmp_path / name)}
        run(job(tmp_path, model=str(model), sampling=sampling, engine=settings, output=place), llm)
        assert len(freed) == (0 if most_tokens == 64 else 2)
        return rows_of_output(tmp_path / name)

    expected = rows("whole", 64)
    assert "out of device memory" not in capfd.readouterr().err
    found = rows("short", 16)
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "out of device memory" in line]
    budgets = [line["max_step_tokens"] for line in said]
    assert len(budgets) == 2 and 16 == budgets[1] < budgets[0] <= 32 and "engine.max_num_seqs" in said[0]["message"]
    assert found == expected and all(row["error"] is None for row in found) and len(found) == 6


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_that_memory_ran_out(error, is_one):
    assert is_out_of_memory(error) == is_one
    expected = ModelError if is_one else type(error)
    said = "no room on the device for x: y" if is_one else re.escape(str(error))
    with pytest.raises(expected, match=said), room_for("x", "y"):
        raise error
