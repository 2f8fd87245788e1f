"""Command line of the gate: exit status 1 if a kernel fails on a target.

Bounds lie in docs/design/kernels-gpu.md; `--write-bounds` rewrites the rows of what it compiled, with a margin.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from batchinfer_kernels.aot.bounds import PAGE, Bounds, BoundsError, bound_with_margin, read_bounds, write_bounds
from batchinfer_kernels.aot.gate import (
    Compiled,
    compile_all,
    default_workers,
    faults_of,
    jobs_of,
    kernel_modules,
    kernels_without_case,
)
from batchinfer_kernels.triton.targets import TARGETS

_COLUMNS = "{:36} {:7} {:>4} {:>6} {:>7} {:>5} {:>6} {:>4} {:>5}  {:14} {:>5}\n"
_HEADINGS = ("kernel", "target", "regs", "spill", "KiB", "MMA", "async", "K/V", "occ", "limited by", "s")


def main(arguments: Sequence[str] | None = None, modules: Sequence[str] | None = None) -> int:
    """Run the gate and return its exit status. `modules`: kernel files, all of the Triton backend by default."""
    options = _parse(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # before any import of Triton: interpreted kernels cannot be compiled
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    with tempfile.TemporaryDirectory(prefix="batchinfer-aot-") as folder:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or folder)
        try:
            return _gate(options, modules)
        except BoundsError as error:
            sys.stderr.write(f"{error}\n")
            return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m batchinfer_kernels.aot", description="Compile every kernel for every target and check the results."
    )
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--kernel", help="only cases, or kernel files, of this name")
    parser.add_argument("--jobs", type=int, default=default_workers(), help="worker processes (default: all cores)")
    parser.add_argument("--cache", type=Path, help="folder of Triton's cache (default: a new one)")
    parser.add_argument("--bounds", type=Path, default=PAGE, help="page with the table of bounds")
    parser.add_argument("--write-bounds", action="store_true", help="write bounds from the figures, with a margin")
    options = parser.parse_args(arguments)
    options.targets = options.targets or list(TARGETS)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(TARGETS)}")
    return options


def _gate(options: argparse.Namespace, modules: Sequence[str] | None) -> int:
    bounds = read_bounds(options.bounds)
    jobs = jobs_of(kernel_modules() if modules is None else modules, options.targets, options.kernel)
    if not jobs:
        sys.stderr.write(f"no kernel is named {options.kernel}\n")
        return 1
    sys.stdout.write(_COLUMNS.format(*_HEADINGS))
    results = []
    for result in compile_all(jobs, min(options.jobs, len(jobs))):
        sys.stdout.write(_row(result))
        sys.stdout.flush()
        results.append(result)
    if options.write_bounds:
        bounds = _new_bounds(bounds, results, keep=options.kernel is not None or modules is not None)
        write_bounds(options.bounds, bounds, list(TARGETS))
    faults = [
        f"{result.job.case} on {result.job.target}: {'; '.join(found)}"
        for result in results
        if (found := faults_of(result, bounds))
    ]
    if modules is None and options.kernel is None:
        faults += [f"{name} is in no aot_cases" for name in kernels_without_case(options.targets)]
        faults += [
            f"{name} on {target}: the table has a bound and no file has a case"
            for name, of_kernel in bounds.items()
            for target in of_kernel
            if target in options.targets and not any(x.job.case == name and x.job.target == target for x in results)
        ]
    sys.stderr.writelines(f"FAIL {fault}\n" for fault in faults)
    sys.stdout.write(f"{len(results)} kernels compiled, {len(faults)} faulty\n")
    return 1 if faults else 0


def _new_bounds(bounds: Bounds, results: Sequence[Compiled], keep: bool) -> Bounds:
    targets = {result.job.target for result in results}
    new = {
        name: {target: bound for target, bound in row.items() if keep or target not in targets}
        for name, row in bounds.items()
    }
    for result in results:
        if result.figures is not None:
            target = TARGETS[result.job.target]
            bound = bound_with_margin(result.figures.registers, result.figures.shared_bytes, target)
            new.setdefault(result.job.case, {})[result.job.target] = bound
    return {name: row for name, row in new.items() if row}


def _row(result: Compiled) -> str:
    name, target, figures = result.job.case, result.job.target, result.figures
    if figures is None:
        return f"{name:36} {target:7} does not compile\n"
    return _COLUMNS.format(
        name,
        target,
        figures.registers,
        figures.spilled_bytes,
        f"{figures.shared_bytes / 1024:.1f}",
        figures.mma,
        figures.async_copies,
        figures.kv_buffers,
        f"{figures.occupancy:.0%}",
        figures.limit,
        f"{result.seconds:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
