"""Run every test of an op on every backend: plain torch, C++ with each instruction set, and Triton's interpreter.

With `pytest -m gpu` on a GPU instead.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu import library
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.triton import make_backend

from tests.kernels.on_device import OnDevice

_COMPILED = library.variants() if cpu.problem() is None else ["C++"]
_TRITON = importlib.util.find_spec("triton") is not None
_MISSING = {} if cpu.problem() is None else {"C++": str(cpu.problem())}
if not _TRITON:
    _MISSING["triton"] = "triton is not installed"
_ABOUT_GPU_KERNELS = ("test_ops", "test_padding")  # the others are about matrices, which on GPUs are torch's alone


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        variants = ["eager", *_COMPILED, "triton"]
        if metafunc.config.option.markexpr == "gpu":
            on_gpu = metafunc.module.__name__.rpartition(".")[2] in _ABOUT_GPU_KERNELS
            variants = [pytest.param("cuda", marks=pytest.mark.gpu)] if on_gpu else []
        metafunc.parametrize("variant", variants, indirect=True)


@pytest.fixture
def variant(request):
    """`eager`, `triton`, `cuda`, or the name of a C++ variant."""
    if request.param in _MISSING:
        pytest.skip(_MISSING[request.param])
    if request.param != "eager" and request.config.getoption("--eager-kernels"):
        pytest.skip("--eager-kernels")
    if request.param in ("triton", "cuda") and torch.float64 in _parameters(request):
        pytest.skip("computes in float32")
    return request.param


def _parameters(request):
    return request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()


def make_interpreted_backend():
    from tests.kernels import interpreter  # imports triton

    interpreter.install()
    return make_backend("cpu", lambda fallback: None)


@pytest.fixture
def ops(variant):
    """Return the backend under test. Fallbacks are allowed: see test_fallbacks."""
    if variant == "eager":
        return EagerBackend(torch.device("cpu"))
    if variant == "cuda":
        return OnDevice(make_backend("cuda", lambda fallback: None), "cuda")
    if variant == "triton":
        return make_interpreted_backend()
    return cpu.CPUBackend(lambda fallback: None, variant)


@pytest.fixture
def eager():
    """Return the eager backend alone."""
    return EagerBackend(torch.device("cpu"))


@pytest.fixture
def interpreted():
    """Return the Triton backend alone, in the interpreter."""
    if not _TRITON:
        pytest.skip("triton is not installed")
    return make_interpreted_backend()


@pytest.fixture
def compiled(variant):
    """For what is about C++ alone."""
    if variant not in _COMPILED:
        pytest.skip("about C++")


@pytest.fixture
def not_compiled(variant):
    """For what C++ is never given."""
    if variant in _COMPILED:
        pytest.skip("C++ gets steps without padding")
