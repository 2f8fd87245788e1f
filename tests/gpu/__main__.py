"""One command for a machine with a GPU: the tests, then the benchmark.

Needs torch, Triton, NumPy, pytest and hypothesis, and takes pytest-xdist where it is installed.

`python -m tests.gpu [FILE]` writes the benchmark's tables to FILE, gpu.md by default.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import benchmark

_ROOT = Path(__file__).parents[2]
_SHARED_BY = 4  # processes: more share one GPU no faster


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("torch finds no CUDA device; `pytest tests/gpu` runs what needs none\n")
        return 1
    # pytest's plugins may be missing, and so may options of theirs in pyproject.toml
    options = ["-m", "gpu", "-o", "addopts=-q", "-W", "ignore::pytest.PytestConfigWarning", "-p", "no:cacheprovider"]
    options.append(f"--ignore={_ROOT / 'tests' / 'kernels' / 'test_fallbacks.py'}")  # about C++, and needs gguf
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(_SHARED_BY), "--dist", "worksteal"]
    folders = [str(_ROOT / "tests" / "gpu"), str(_ROOT / "tests" / "kernels")]
    if status := pytest.main([*options, "--rootdir", str(_ROOT), *folders]):
        return int(status)
    benchmark.main(arguments or ["gpu.md"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
