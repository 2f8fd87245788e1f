"""Fixtures of benchmark tests: a tiny model with a tokenizer, fast limits, the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from batchinfer.bench import machine
from batchinfer.cli.main import main
from tests.models.tiny import SIZES, build


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    build("llama", folder)
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w2", "bos_token": "w1"}')
    return folder


@pytest.fixture
def quick_machine(monkeypatch):
    """Measure rates with one attempt on little data: these tests check no times."""
    monkeypatch.setattr(machine, "_GEMM_SIZES", (16,))
    monkeypatch.setattr(machine, "_GEMM_BUDGET_S", 0.0)
    monkeypatch.setattr(machine, "_BANDWIDTH_BUDGET_S", 0.0)
    monkeypatch.setattr(machine, "_MOST_BYTES", 1 << 16)


@pytest.fixture
def bench(quick_machine) -> Callable[..., int]:
    """Return a function that runs `batchinfer bench …` and returns its exit code; restore the threads."""
    threads = torch.get_num_threads()

    def run(*arguments: object) -> int:
        return main(["--no-log-json", "bench", *map(str, arguments)])

    yield run
    torch.set_num_threads(threads)
