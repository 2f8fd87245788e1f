"""One command for a machine with a GPU: the tests, then the benchmark.

Needs torch, Triton, NumPy, pytest and hypothesis, and takes pytest-xdist where it is installed.

`python -m tests.gpu FILE` writes the benchmark's tables to FILE.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import benchmark

_ROOT = Path(__file__).parents[2]
_TESTS = (
    "gpu",
    "kernels/test_ops.py",
    "kernels/test_padding.py",
)  # all tests marked gpu; other files import more packages
_SHARED_BY = 4  # processes: more share one GPU no faster


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("torch finds no CUDA device; `pytest tests/gpu` runs what needs none\n")
        return 1
    # pytest's plugins may be missing, and so may options of theirs in pyproject.toml
    options = ["-m", "gpu", "-o", "addopts=-q", "-W", "ignore::pytest.PytestConfigWarning", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(_SHARED_BY), "--dist", "worksteal"]
    if status := pytest.main([*options, "--rootdir", str(_ROOT), *(str(_ROOT / "tests" / path) for path in _TESTS)]):
        return int(status)
    benchmark.main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
