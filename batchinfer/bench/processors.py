"""Processors that a roofline is computed for: GPUs by their data sheets, and the CPU of this machine as measured.

Rates are those of dense matrix products on tensor cores, sums in float32. Data sheets print twice as much with a star,
for matrices of which every other number is zero. Bandwidths are nominal; where a figure for what reading reaches is
known, the roofline takes that one and prints both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from batchinfer.bench.machine import Bandwidth, Machine
from batchinfer.errors import UsageError, suggest
from batchinfer.ops.choose import available_backends
from batchinfer.ops.resources import free_bytes

CPU = "cpu"
CPU_DTYPES = ("float32", "bfloat16", "float16", "int8")
_PASSED_BYTES = 1 << 20  # about what the ops of a step of some hundred tokens pass to one another


class Processor(NamedTuple):
    """Rates per second. `operations_per_s` by dtype of the matrices; `source`: the document that they are from.

    `cache_bytes_per_s`: bandwidth of what a step's ops pass to one another, if a cache holds it. `max_draft_rows`: see
    Capabilities; it decides whether a prompt waits for a prefix that another one computes.
    """

    name: str
    memory_bytes: float
    nominal_bytes_per_s: float
    operations_per_s: Mapping[str, float]
    source: str
    reached_bytes_per_s: float | None = None
    cache_bytes_per_s: float | None = None
    max_draft_rows: int = 32

    @property
    def bytes_per_s(self) -> float:
        return self.reached_bytes_per_s or self.nominal_bytes_per_s


def _gpu(name: str, memory_gb: float, bandwidth_tb: float, tflops: tuple[float, ...], source: str) -> Processor:
    """Return a GPU from the decimal units of data sheets. tflops: of 16-bit matrices, and of 8-bit ones if it has any.

    Both 16-bit types have one rate.
    """
    dtypes = ("bfloat16", "float16", "float8")
    rates = dict(zip(dtypes, (1e12 * rate for rate in (tflops[0], *tflops)), strict=False))
    return Processor(name, 1e9 * memory_gb, 1e12 * bandwidth_tb, rates, source)


_A100 = "NVIDIA A100 80GB data sheet, 2021"
_H100 = "NVIDIA H100 data sheet, 2023"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A"

GPUS: dict[str, Processor] = {
    "a100-pcie": _gpu("NVIDIA A100 80GB PCIe", 80, 1.935, (312,), _A100),
    "a100-sxm": _gpu("NVIDIA A100 80GB SXM", 80, 2.039, (312,), _A100),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 80, 2.0, (756, 1513), _H100),
    "h100-sxm": _gpu("NVIDIA H100 SXM", 80, 3.35, (989, 1979), _H100),
    "h200": _gpu("NVIDIA H200 SXM", 141, 4.8, (989, 1979), "NVIDIA H200 data sheet, 2024")._replace(
        reached_bytes_per_s=4.3e12
    ),
    "b200": _gpu("NVIDIA B200 SXM", 180, 8.0, (2250, 4500), "NVIDIA HGX B200 data sheet, 2025"),
    "l40s": _gpu("NVIDIA L40S", 48, 0.864, (362, 733), "NVIDIA L40S data sheet, 2023"),
    "l4": _gpu("NVIDIA L4", 24, 0.3, (121, 242), "NVIDIA L4 data sheet, 2023"),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 24, 1.008, (165.2, 330.3), _ADA),
    "mi300x": _gpu("AMD Instinct MI300X", 192, 5.3, (1307.4, 2614.9), "AMD Instinct MI300X data sheet, 2023"),
}


def find_gpu(name: str) -> Processor:
    """Return an entry of the table. Raises UsageError."""
    if name not in GPUS:
        raise UsageError(f"--gpu {name}: unknown{suggest(name, [*GPUS, CPU])} (known: {', '.join(GPUS)}, {CPU})")
    return GPUS[name]


def this_cpu(machine: Machine) -> Processor:
    """Return the processor of a measured machine; a cache's bandwidth and the free memory are found out here."""
    rates = {machine.dtype: machine.gemm_per_s}
    if machine.int8_per_s is not None:
        rates["int8"] = machine.int8_per_s
    return Processor(
        machine.cpu,
        free_bytes(),
        machine.read_bytes_per_s,
        rates,
        "measured",
        cache_bytes_per_s=Bandwidth().of(_PASSED_BYTES),
        max_draft_rows=available_backends()[0].capabilities.max_draft_rows,
    )
