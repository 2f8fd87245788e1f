"""Every test of an op runs on every backend that is here: plain torch, and C++ with each instruction set."""

from __future__ import annotations

import pytest
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu import library

from batchinfer import ops

_VARIANTS = [] if cpu.problem() else library.variants()


@pytest.fixture(params=["eager", *library.VARIANTS])
def backend(request):
    name = request.param
    if name == "eager":
        ops.use_eager("cpu")
        yield name
        ops.use_eager("cpu", request.config.getoption("--eager-kernels"))
        return
    if request.config.getoption("--eager-kernels"):
        pytest.skip("--eager-kernels")
    if name not in _VARIANTS:
        pytest.skip(cpu.problem() or f"this processor has no {name}")
    ops.use_eager("cpu", False)
    library.choose(name)
    yield name
    library.choose(_VARIANTS[0])


@pytest.fixture
def compiled(backend):
    """For what is about C++ alone."""
    if backend == "eager":
        pytest.skip("about C++")
