"""Compilation of all kernels in worker processes, and what the gate finds wrong with the results."""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from types import ModuleType
from typing import NamedTuple

import batchinfer_kernels.triton
from batchinfer_kernels.aot.bounds import Bounds
from batchinfer_kernels.aot.figures import Figures, figures_of
from batchinfer_kernels.triton.targets import TARGETS, AotCase, Needs, Target


class Job(NamedTuple):
    """One case to compile, by names, so that it can be sent to a worker process."""

    module: str
    case: str
    target: str


class Compiled(NamedTuple):
    """Result of one case: figures, or what the compiler said."""

    job: Job
    needs: Needs
    figures: Figures | None
    error: str = ""
    seconds: float = 0.0


def kernel_modules() -> list[str]:
    """Return the names of the kernel files: modules of the Triton backend that have `aot_cases`."""
    return [module.__name__ for module in _modules() if hasattr(module, "aot_cases")]


def kernels_without_case(targets: Sequence[str]) -> list[str]:
    """Return the kernels of the Triton backend that no case compiles: functions of @triton.jit named *_kernel."""
    kernels = {
        id(value): f"{module.__name__}.{name}"
        for module in _modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and type(value).__name__ in ("JITFunction", "InterpretedFunction")
    }
    for module in kernel_modules():
        for target in targets:
            for case in _cases(module, target).values():
                kernels.pop(id(case.function), None)
    return sorted(kernels.values())


def _modules() -> list[ModuleType]:
    package = batchinfer_kernels.triton
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


def jobs_of(modules: Sequence[str], targets: Sequence[str], kernel: str | None) -> list[Job]:
    """Return the cases of the modules whose name, or whose file's name, begins with `kernel`."""
    return [
        Job(module, name, target)
        for target in targets
        for module in modules
        for name in _cases(module, target)
        if kernel is None or name.startswith(kernel) or module.rpartition(".")[2] == kernel
    ]


@cache
def _cases(module: str, target: str) -> dict[str, AotCase]:
    cases: list[AotCase] = importlib.import_module(module).aot_cases(TARGETS[target])
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"{module} has two cases of one name for {target}: {sorted(names)}")
    return dict(zip(names, cases, strict=True))


def compile_all(jobs: Sequence[Job], workers: int) -> Iterator[Compiled]:
    """Compile the cases, in this process if there is one worker; results come in order of completion."""
    if workers == 1:
        yield from map(_compile, jobs)
        return
    # forked children would inherit threads of torch; large kernels first, so that no worker ends much later
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        large_first = sorted(jobs, key=lambda job: not _cases(job.module, job.target)[job.case].needs.tensor_cores)
        for future in as_completed([pool.submit(_compile, job) for job in large_first]):
            yield future.result()


def _compile(job: Job) -> Compiled:
    case, target = _cases(job.module, job.target)[job.case], TARGETS[job.target]
    start = time.perf_counter()
    try:
        figures = _compile_case(case, target)
    except Exception as error:  # the compiler's, of any kind; all cases are reported
        return Compiled(job, case.needs, None, f"{type(error).__name__}: {error}")
    return Compiled(job, case.needs, figures, seconds=time.perf_counter() - start)


def _compile_case(case: AotCase, target: Target) -> Figures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    if missing := set(names) - set(case.signature) - set(case.constexprs):
        raise ValueError(f"the case lacks the types of {', '.join(sorted(missing))}")
    source = ASTSource(
        case.function,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return figures_of(triton.compile(source, target=gpu, options=case.launch.options), target)


def faults_of(compiled: Compiled, bounds: Bounds) -> list[str]:
    """Return what is wrong with a compiled case, one message each."""
    job, needs, figures = compiled.job, compiled.needs, compiled.figures
    if figures is None:
        return [compiled.error]
    faults = []
    if figures.spilled_bytes:
        faults.append(f"{figures.spilled_bytes} bytes of a thread's registers are spilled to local memory")
    if needs.tensor_cores and not figures.mma:
        faults.append("no tensor-core instruction: too few rows in a dot, or a type that they do not take")
    if needs.async_copies and TARGETS[job.target].backend == "cuda" and not figures.async_copies:
        faults.append("no asynchronous copy: the loop over keys is not pipelined (num_stages, or a load's alignment)")
    if needs.kv_buffers and (figures.kv_buffers < needs.kv_buffers or figures.pipelined_loads < 2):
        faults.append(
            f"{figures.kv_buffers} K/V buffers ({figures.pipelined_loads} pipelined loads), fewer than "
            f"{needs.kv_buffers}: loads of the next keys do not overlap with products of these"
        )
    return faults + _above_bounds(job, figures, bounds)


def _above_bounds(job: Job, figures: Figures, bounds: Bounds) -> list[str]:
    bound = bounds.get(job.case, {}).get(job.target)
    if bound is None:
        return ["no bound in the table (--write-bounds adds one)"]
    faults = []
    if figures.registers > bound.registers:
        faults.append(f"{figures.registers} registers, above the bound of {bound.registers}")
    if figures.shared_bytes > bound.shared_kib * 1024:
        faults.append(f"{figures.shared_bytes / 1024:.1f} KiB of shared memory, above the bound of {bound.shared_kib}")
    return faults


def default_workers() -> int:
    return len(os.sched_getaffinity(0))
