"""What is decided for the machine, and the model's own sampling defaults."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from batchinfer_kernels.cpu import library

from batchinfer.errors import ModelError
from batchinfer.io.fetch import ModelFiles
from batchinfer.ops.resources import quota_threads
from batchinfer.pipeline.load import _defaults, _generation_config, _load_model
from batchinfer.spec import EngineSpec
from tests.models.tiny import build


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "max 100000\n"}, sys.maxsize),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({}, sys.maxsize),
    ],
)
def test_threads_within_the_quota(tmp_path: Path, files: dict[str, str], threads: int) -> None:
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert quota_threads(tmp_path) == threads


def test_sampling_defaults_of_the_model(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, "x")
    assert _defaults(_generation_config(tmp_path), files).temperature == 1.0
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True, "max_length": 9}))
    params = _defaults(_generation_config(tmp_path), files)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.9, 20, None)
    config.write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert _defaults(_generation_config(tmp_path), files).greedy
    config.write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ModelError, match=r"generation_config.json: top_p must be in"):
        _defaults(_generation_config(tmp_path), files)
    config.write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        _generation_config(tmp_path)


def test_longrope_says_once_which_factors_it_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build("phi3-longrope", tmp_path)
    for context, said in ((None, 1), (32, 0)):
        _load_model(EngineSpec(kv_cache_tokens=256, max_model_len=context), tmp_path)
        assert capfd.readouterr().err.count("longrope: ") == said


@pytest.mark.parametrize(("quantization", "vnni", "said"), [("int8", False, 1), ("int8", True, 0), (None, False, 0)])
def test_int8_without_vnni_logs_that_it_is_no_faster(tmp_path, capfd, monkeypatch, quantization, vnni, said) -> None:
    build("llama", tmp_path)
    monkeypatch.setattr(library, "WITH_VNNI", library.VARIANTS if vnni else ())
    _load_model(EngineSpec(kv_cache_tokens=256, quantization=quantization), tmp_path)
    assert capfd.readouterr().err.count("int8 will not be faster than float32") == said
