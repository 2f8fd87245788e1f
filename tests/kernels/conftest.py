"""Run every test of an op on every backend that this machine has: plain torch, and C++ with each instruction set."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu import library
from batchinfer_kernels.eager import EagerBackend

_VARIANTS = [] if cpu.problem() else library.variants()


@pytest.fixture(params=["eager", *(_VARIANTS or [pytest.param("C++", marks=pytest.mark.skip(str(cpu.problem())))])])
def variant(request):
    """`eager`, or the name of a C++ variant."""
    if request.param != "eager" and request.config.getoption("--eager-kernels"):
        pytest.skip("--eager-kernels")
    return request.param


@pytest.fixture
def ops(variant):
    """Return the backend under test. Fallbacks are allowed: see test_fallbacks."""
    return EagerBackend(torch.device("cpu")) if variant == "eager" else cpu.CPUBackend(lambda fallback: None, variant)


@pytest.fixture
def compiled(variant):
    """For what is about C++ alone."""
    if variant == "eager":
        pytest.skip("about C++")
