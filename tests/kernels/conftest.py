"""Run every test of an op on every backend that this machine has: plain torch, and C++ with each instruction set."""

from __future__ import annotations

import pytest
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu import library

from batchinfer import ops

_VARIANTS = [] if cpu.problem() else library.variants()


@pytest.fixture(params=["eager", *(_VARIANTS or [pytest.param("C++", marks=pytest.mark.skip(str(cpu.problem())))])])
def backend(request):
    name = request.param
    if name == "eager":
        ops.use_eager("cpu")
        yield name
        ops.use_eager("cpu", request.config.getoption("--eager-kernels"))
        return
    if request.config.getoption("--eager-kernels"):
        pytest.skip("--eager-kernels")
    ops.use_eager("cpu", False)
    library.choose(name)
    yield name
    library.choose(_VARIANTS[0])


@pytest.fixture
def compiled(backend):
    """For what is about C++ alone."""
    if backend == "eager":
        pytest.skip("about C++")
