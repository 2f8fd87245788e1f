"""Benchmark of the GPU engine: `python -m tests.gpu.benchmark FILE` writes Markdown tables for docs/benchmarks.

Takes about 4 minutes on one H100 or H200. `--tiny --device interpreted` runs all of it without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter

import torch

from batchinfer.bench.table import number
from tests.gpu import engine_rates, op_rates
from tests.gpu.engine_rates import StepSplit, Throughput, Workload
from tests.gpu.op_rates import Rate, Shapes
from tests.gpu.random_model import LLAMA3_8B, QWEN3_06B, TINY
from tests.gpu.rig import Rig, make_rig

_OPS_HEADER = ("model", "op", "shape", "us", "GB/s", "of copy", "TFLOP/s", "of product")
_STEPS_HEADER = ("model", "steps ahead", "sequences", "ms/step", "of them waited", "host ms")
_RUN_HEADER = ("model", "s", "tokens/s out", "limit s", "of limit", "steps", "preemptions", "graphs captured, s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; write the tables to the file."""
    parser = argparse.ArgumentParser("python -m tests.gpu.benchmark", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "interpreted", "pretend"))
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    options = parser.parse_args(arguments)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(measure(make_rig(options.device), options.tiny, sys.stdout.write), "utf-8")


@torch.inference_mode()
def measure(rig: Rig, tiny: bool, show: Callable[[str], object]) -> str:
    """Return Markdown: the device, its ops, its steps, and the workload. `show` gets each table when it is ready."""
    began = perf_counter()
    dtype = torch.float32 if tiny else torch.bfloat16
    parts = [_heading(rig)]
    show(parts[0])
    copied, multiplied = op_rates.device_limits(rig, op_rates.TINY if tiny else op_rates.QWEN3_06B, dtype)

    def add(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        parts.append(markdown_table(header, rows))
        show(f"{parts[-1]}\n({perf_counter() - began:.0f} s)\n")

    limits = [("", copied), ("", multiplied)]
    models: list[Shapes] = [op_rates.TINY] if tiny else [op_rates.QWEN3_06B, op_rates.LLAMA3_8B]
    found = [(shapes.name, rate) for shapes in models for rate in op_rates.op_rates(rig, shapes, dtype, not tiny)]
    add(_OPS_HEADER, (_op_row(name, rate, copied, multiplied) for name, rate in limits + found))
    splits: list[StepSplit] = []
    runs: list[tuple[Throughput, float]] = []
    configs = {"tiny": TINY} if tiny else {"Qwen3-0.6B": QWEN3_06B, "Llama-3-8B": LLAMA3_8B}
    workload = engine_rates.TINY if tiny else Workload()
    for name, values in configs.items():
        rates = engine_rates.measured_model(rig, name, values, dtype, workload)
        splits += [rates.step_split(depth) for depth in (0, 1)]
        runs.append((rates.throughput(copied.bytes_per_s, multiplied.operations_per_s), rates.capture_s))
        del rates
    add(_STEPS_HEADER, map(_step_row, splits))
    add(_RUN_HEADER, (_run_row(run, capture_s) for run, capture_s in runs))
    return "\n\n".join(parts) + "\n"


def _heading(rig: Rig) -> str:
    device = torch.cuda.get_device_name(rig.device) if rig.is_gpu else f"{rig.name} on {platform.machine()}"
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if rig.name != "pretend":
        import triton

        versions.insert(1, f"Triton {triton.__version__}")
    if rig.is_gpu:
        versions.append(f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}")
    return f"{device}, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}. {', '.join(versions)}.\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _op_row(model: str, rate: Rate, copied: Rate, multiplied: Rate) -> list[str]:
    computed = ["", ""]
    if rate.operations:
        share = rate.operations_per_s / multiplied.operations_per_s
        computed = [number(rate.operations_per_s / 1e12), f"{share:.0%}"]
    moved = [number(rate.bytes_per_s / 1e9), f"{rate.bytes_per_s / copied.bytes_per_s:.0%}"]
    return [model, rate.op, rate.shape, number(1e6 * rate.seconds), *moved, *computed]


def _step_row(split: StepSplit) -> list[str]:
    times = map(number, (split.step_ms, split.waited_ms, split.host_ms))
    return [split.model, str(split.depth), str(split.sequences), *times]


def _run_row(run: Throughput, capture_s: float) -> list[str]:
    rates = [number(run.seconds), number(run.tokens_per_s), number(run.limit_s), f"{run.limit_s / run.seconds:.0%}"]
    return [run.model, *rates, str(run.steps), str(run.preemptions), number(capture_s)]


if __name__ == "__main__":
    main()
