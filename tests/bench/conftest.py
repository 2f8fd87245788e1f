"""Fixtures of benchmark tests: a tiny model with a tokenizer, fast limits, the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from batchinfer.bench import machine
from batchinfer.cli.main import main
from tests.models.tiny import build, write_word_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    build("llama", folder)
    write_word_tokenizer(folder)
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
