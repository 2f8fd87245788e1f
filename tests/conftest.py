"""Fixtures shared by all test folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchinfer.log import log
from batchinfer.ops.devices import BACKENDS

pytest_plugins = ["tests.sampling", "tests.servers"]
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it, for the reason given there
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # workers share the cores, and so do their subprocesses
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

_ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--eager-kernels", action="store_true", help="run every op in plain torch, as without C++")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # before a module with GPU kernels is imported: the CPU runs them
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("--eager-kernels"):
        BACKENDS["cpu"] = BACKENDS["cpu"][-1:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _gpu_available():
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


def _gpu_available() -> bool:
    import torch  # collecting tests that need no torch does not import it

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _log_as_at_the_start() -> Iterator[None]:
    """Undo what a test configured, as through the command line's options."""
    yield
    log.configure("info", None)


@pytest.fixture(scope="session")
def plain_torch(pytestconfig: pytest.Config) -> bool:
    """Return True if no C++ runs.

    Torch's results for a row can depend, in the last bits, on the other rows of the batch.
    """
    return bool(pytestconfig.getoption("--eager-kernels"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the path of the quickstart's model. Tests that use it carry the marker `model`."""
    path = Path(os.environ.get("BATCHINFER_TEST_MODEL", _ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.is_file():
        pytest.fail(f"{path} does not exist: run `make model`, or point BATCHINFER_TEST_MODEL at the GGUF file")
    return path
