"""A third backend needs a module and one line of the table: a model runs on it through `engine.device`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batchinfer_kernels import eager, triton

from batchinfer import LLM, SamplingParams
from batchinfer.errors import ModelError, UsageError
from batchinfer.ops import choose, devices
from batchinfer.ops.devices import BACKENDS
from batchinfer.request import Completion
from tests.models.tiny import build, write_word_tokenizer
from tests.ops import toy

OPS = {
    *("rms_norm", "add_rms_norm", "linear", "gated_linear", "packed_rows", "rope_kv_write", "paged_attention"),
    *("pack", "pack_gated", "pack_rows", "argmax_bounds", "prepare", "layer_stack", "allocate_kv"),
}
PARAMS = [SamplingParams(temperature=t, max_tokens=12, ignore_eos=True) for t in (0.0, 0.9, 0.0)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Build a model with norms of queries and keys and a head of its own, so that every op is called."""
    build("qwen3", tmp_path)
    write_word_tokenizer(tmp_path)
    return tmp_path


def test_a_model_runs_on_a_backend_that_the_table_names(model, monkeypatch):
    def answers(device: str) -> list[list[int]]:
        llm = LLM(model, device=device, kv_cache_tokens=512)
        found = llm.generate([[5, 6, 7, 5, 6, 7, 5], [8, 9], [3] * 20], PARAMS) + llm.generate([[9, 5, 6]], PARAMS[0])
        return [_tokens(one) for one in found]

    monkeypatch.setitem(BACKENDS, "toy", ("tests.ops.toy",))
    toy.CALLS.clear()
    got = answers("toy")
    assert all(toy.CALLS[op] for op in OPS), OPS - set(toy.CALLS)
    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["cpu"][-1:])
    assert answers("cpu") == got


def _tokens(completion: Completion) -> list[int]:
    assert completion.error is None
    return completion.outputs[0].token_ids


@pytest.mark.parametrize(
    ("name", "near"), [("tpu", ""), ("Auto", "did you mean 'auto'"), ("cpus", "did you mean 'cpu'")]
)
def test_a_device_that_no_backend_serves_is_refused_before_the_model_is_looked_for(name, near):
    with pytest.raises(UsageError, match=f"device: must be one of auto, cuda, cpu; no backend serves '{name}'.*{near}"):
        LLM("no/such/model", device=name)


def test_auto_takes_the_next_device_where_no_backend_serves_the_best(monkeypatch, capsys):
    monkeypatch.setattr(toy, "PROBLEM", ["no toy is plugged in"])
    ordered = {"toy": ("tests.ops.toy",), **BACKENDS}
    monkeypatch.setattr(choose, "BACKENDS", ordered)
    monkeypatch.setattr(devices, "BACKENDS", ordered)
    assert choose.load_backend("auto").device.type == "cpu"
    assert choose.available_backends("auto") and not choose.available_backends("toy")
    assert "no toy" not in capsys.readouterr().err


def test_a_device_whose_backends_cannot_serve_here_is_refused_with_why(model, monkeypatch):
    monkeypatch.setitem(BACKENDS, "toy", ("tests.ops.toy",))
    monkeypatch.setattr(toy, "PROBLEM", ["no toy is plugged in"])
    with pytest.raises(ModelError, match=r"engine\.device: no backend of toy can serve .*: no toy is plugged in"):
        LLM(model, device="toy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
class TestWithoutGPU:
    def test_auto_finds_the_host_s_backend_in_silence_and_loads_no_compiler_of_kernels(self):
        code = (
            "import sys, warnings; warnings.simplefilter('error')\n"
            "from batchinfer.ops.choose import load_backend\n"
            "assert load_backend('auto').device.type == 'cpu'\n"
            "assert 'batchinfer_kernels.triton' in sys.modules\n"
            "print([name for name in sys.modules if name.split('.')[0] == 'triton' or name.endswith('triton.backend')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("[]\n", "")

    def test_its_device_is_refused_with_why(self, model):
        with pytest.raises(
            ModelError, match=r"no backend of cuda can serve on this machine: torch finds no .*; torch: "
        ):
            LLM(model, device="cuda")


def test_a_gpu_without_the_compiler_of_kernels_is_served_in_plain_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.problem("cuda") == "triton is not installed"
    monkeypatch.undo()
    assert (triton.problem("cuda") is None) == torch.cuda.is_available()


def test_the_eager_backend_serves_no_device_that_torch_lacks():
    assert eager.problem("cpu") is None
    assert (eager.problem("cuda") is None) == torch.cuda.is_available()
