"""One benchmark session: the machine before, and the load and speed changes until the end."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from batchinfer.bench.machine import gemm_rate, look_at

_DRIFT = 0.1  # relative change of the GEMM rate from which it is reported
_OTHERS = 0.1  # cores busy for others from which they are reported
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal


class Session:
    """Session of one benchmark. `machine` is measured at its start."""

    def __init__(self, dtype: torch.dtype = torch.float32, int8: bool = False) -> None:
        self._others = OtherLoad()
        self.machine = look_at(dtype, int8)

    def end(self) -> tuple[dict[str, Any], list[str]]:
        """Return the machine and its changes, for the JSON file, and notes that were not printed yet."""
        cores = self._others.cores()
        machine, after = self.machine, gemm_rate(getattr(torch, self.machine.dtype))
        notes = []
        if cores is not None and cores > _OTHERS:
            notes.append(f"other processes, or other virtual machines, kept {cores:.1f} cores busy meanwhile")
        if abs(after / machine.gemm_per_s - 1) > _DRIFT:
            rates = f"{machine.gemm_per_s / 1e9:,.0f} GFLOP/s before, {after / 1e9:,.0f} after"
            notes.append(f"the machine changed its speed meanwhile: {rates}")
        values = {
            "machine": machine.as_json(),
            "gemm_per_s_after": after,
            "other_cores": cores,
            "notes": [*machine.notes, *notes],
        }
        return values, notes


class OtherLoad:
    """CPU use of everything but this process, including time stolen by a hypervisor; Linux only."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._read()

    def cores(self) -> float | None:
        """Return the mean number of cores that others kept busy since construction."""
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, ours, seconds = (after - before for after, before in zip(now, self._before, strict=True))
        return max(0.0, (busy - ours) / seconds)

    def _read(self) -> tuple[float, float, float] | None:
        """Return seconds: busy time of all cores, this process's share of it, and the clock."""
        try:
            columns = self._stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
            ticks = sum(int(columns[place]) for place in _BUSY_COLUMNS)
        except (OSError, ValueError, IndexError):
            return None
        times = os.times()
        return ticks / os.sysconf("SC_CLK_TCK"), times.user + times.system, perf_counter()
