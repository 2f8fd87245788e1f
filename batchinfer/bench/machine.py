"""Description and measured limits of the machine.

Both limits are measured with torch on the benchmark's threads, each as the best of many attempts: the rate of large
matrix products, and the bandwidth of reading or copying a buffer of a given size. Operations count a multiplication and
an addition as two.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchinfer import __version__
from batchinfer.bench.table import facts, number
from batchinfer.bench.timing import time_in_turn
from batchinfer.ops.choose import available_backends
from batchinfer.ops.resources import free_bytes

_GEMM_SIZES = (1024, 2048)
_GEMM_BUDGET_S = 1.0
_MOST_BYTES = 512 << 20  # of a buffer that bandwidth is measured on
_LEAST_BYTES = 4 << 10
_FREE_SHARE = 8  # a buffer is at most this part of the memory that is free
_BANDWIDTH_BUDGET_S = 0.15
_BUSY = 0.25  # load average for each core, before the measurement, that is worth a word


@dataclass(frozen=True)
class Machine:
    """Rates per second: operations, bytes read, and bytes read and written in a copy.

    Operations are those of `dtype`'s GEMM, and of 8-bit integers if requested. `buffer_bytes` is the size of the data
    on which bandwidth was measured. `caches` are sizes in bytes by level.
    """

    cpu: str
    cores: int
    threads: int
    kernels: str
    torch: str
    batchinfer: str
    date: str
    dtype: str
    gemm_per_s: float
    read_bytes_per_s: float
    copy_bytes_per_s: float
    buffer_bytes: int
    caches: dict[str, int]
    load_average: float | None
    int8_per_s: float | None = None

    @property
    def notes(self) -> list[str]:
        if self.load_average is None or self.load_average <= _BUSY * self.cores:
            return []
        return [f"the machine was busy before this began: load average {self.load_average:.2f} on {self.cores} cores"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look_at(dtype: torch.dtype = torch.float32, int8: bool = False) -> Machine:
    """Describe and measure the machine; takes about two seconds. int8: products of 8-bit integers as well."""
    load = _load_average()
    buffer_bytes = _largest_buffer()
    read, copy = _rates(buffer_bytes)
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        kernels=available_backends()[0].capabilities.name,
        torch=torch.__version__,
        batchinfer=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        dtype=str(dtype).removeprefix("torch."),
        gemm_per_s=gemm_rate(dtype),
        read_bytes_per_s=read,
        copy_bytes_per_s=copy,
        buffer_bytes=buffer_bytes,
        caches=_caches(),
        load_average=load,
        int8_per_s=gemm_rate(torch.int8) if int8 else None,
    )


def describe(machine: Machine) -> str:
    buffer = size(machine.buffer_bytes)
    caches = ", ".join(f"{name} {size(held)}" for name, held in machine.caches.items())
    int8 = "" if machine.int8_per_s is None else f", {machine.int8_per_s / 1e9:,.0f} in int8"
    lines = [
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"),
        ("caches", caches or "unknown"),
        ("software", f"batchinfer {machine.batchinfer}, torch {machine.torch}, kernels {machine.kernels}"),
        ("GEMM", f"{machine.gemm_per_s / 1e9:,.0f} GFLOP/s in {machine.dtype}{int8} (torch, square matrices)"),
        (
            "memory",
            f"{machine.read_bytes_per_s / 1e9:,.1f} GB/s read, {machine.copy_bytes_per_s / 1e9:,.1f} GB/s copied "
            f"(both ways counted), on {buffer}",
        ),
        ("date", machine.date),
    ]
    slow_int8 = available_backends()[0].capabilities.slow_int8
    if slow_int8 is not None:
        lines.insert(-1, ("int8", f"no faster than float32: {slow_int8}"))
    return "\n".join([facts(lines), *(f"note: {note}" for note in machine.notes)])


def weight_bandwidth(machine: Machine, weight_bytes: int) -> float:
    """Return the bytes per second at which weights can be read: a small model stays in a cache."""
    return machine.read_bytes_per_s if weight_bytes >= machine.buffer_bytes else Bandwidth().of(weight_bytes)


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of the fastest of some products of large square matrices.

    16-bit numbers may be multiplied as float32, which is faster on some machines.
    """
    best = gemm_rate(torch.float32) if dtype in (torch.bfloat16, torch.float16) else 0.0
    for edge in _GEMM_SIZES:
        left, right = (torch.rand(edge, edge).mul(100).to(dtype) for _ in range(2))
        fastest = _fastest({"gemm": _product(left, right)}, _GEMM_BUDGET_S)
        best = max(best, 2 * edge**3 / fastest)
    return best


def _product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    if left.dtype == torch.int8:
        return lambda: torch._int_mm(left, right)  # the one product of integers that torch has
    return lambda: F.linear(left, right)


class Bandwidth:
    """Bytes per second of reading or copying data of a given size, while it stays in the cache that holds it."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        self._most = _largest_buffer()

    def of(self, data_bytes: int) -> float:
        """Measure on a buffer of that size, rounded up to two or three significant bits, and at most 512 MiB."""
        wanted = max(data_bytes, _LEAST_BYTES)
        grain = 1 << (wanted.bit_length() - 3)
        rounded = min(-(-wanted // grain) * grain, self._most)
        if rounded not in self._known:
            self._known[rounded] = max(_rates(rounded))
        return self._known[rounded]


def readings(data_bytes: int, turns: int = 1) -> tuple[dict[str, Callable[[], object]], int]:
    """Return several ways to read as many bytes, and the number of bytes; which is fastest depends on the machine.

    The number may be larger, rounded up to whole 4 KiB, or smaller, if memory is short. The same bytes are read again
    only after `turns` calls.
    """
    most = _largest_buffer()
    read_bytes = min(-(-data_bytes // _LEAST_BYTES) * _LEAST_BYTES, most)
    data = torch.ones(max(1, min(turns, most // read_bytes)), read_bytes // 4)
    vector = torch.ones(1, 1024)

    def over_data(read: Callable[[Tensor], object]) -> Callable[[], object]:
        following = itertools.cycle(data)
        return lambda: read(next(following))

    ways = {
        "sum": over_data(torch.sum),
        "dot": over_data(lambda part: torch.dot(*part.view(2, -1))),
        "matrix times vector": over_data(lambda part: F.linear(vector, part.view(-1, 1024))),
    }
    return ways, read_bytes


def _rates(buffer_bytes: int) -> tuple[float, float]:
    """Return bytes per second read, and read and written, with a buffer of this total size."""
    ways, read_bytes = readings(buffer_bytes)
    read = _fastest(ways, 2 * _BANDWIDTH_BUDGET_S)
    first, second = torch.ones(2, buffer_bytes // 8)
    copy = _fastest({"copy": lambda: second.copy_(first)}, _BANDWIDTH_BUDGET_S)
    return read_bytes / read, buffer_bytes / copy


def _fastest(works: dict[str, Callable[[], object]], budget_s: float) -> float:
    return min(timing.min_s for timing in time_in_turn(works, budget_s).values())


def _largest_buffer() -> int:
    room = free_bytes() // _FREE_SHARE
    return min(_MOST_BYTES, max(_LEAST_BYTES, 1 << (max(room, 1).bit_length() - 1)))


def size(number_of_bytes: float) -> str:
    """Format a number of bytes as `"48 KiB"` or `"1.5 GiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if number_of_bytes < 1024:
            return f"{number(number_of_bytes)} {unit}"
        number_of_bytes /= 1024
    return f"{number(number_of_bytes)} GiB"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Return the data caches of the first core, as the system reports them.

    A virtual machine may report more than its share.
    """
    found = {}
    for folder in sorted(root.glob("index*")):
        try:
            level, kind = (folder / "level").read_text().strip(), (folder / "type").read_text().strip()
            text = (folder / "size").read_text().strip()
        except OSError:
            continue
        units = {"K": 1 << 10, "M": 1 << 20}
        if kind != "Instruction" and text[:-1].isdigit() and text[-1] in units:
            found[f"L{level}"] = int(text[:-1]) * units[text[-1]]
    return found


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
