"""One benchmark, from the look at the machine to the last word about what else ran on it."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from batchinfer.bench.machine import gemm_rate, look_at

_DRIFT = 0.1  # of the GEMM rate, from before to after, that is worth a word
_OTHERS = 0.1  # cores, likewise
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal


class Session:
    """`machine` was measured when it began."""

    def __init__(self, dtype: torch.dtype = torch.float32, int8: bool = False) -> None:
        self._others = OtherLoad()
        self.machine = look_at(dtype, int8)

    def end(self) -> tuple[dict[str, Any], list[str]]:
        """The machine and what changed meanwhile, for the JSON; and notes that were not shown yet."""
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
    """What everything but this process takes of the machine, time stolen by a hypervisor included; Linux only."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._read()

    def cores(self) -> float | None:
        """Cores that were busy for others, on average since this was made."""
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, ours, seconds = (after - before for after, before in zip(now, self._before, strict=True))
        return max(0.0, (busy - ours) / seconds)

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds that all cores were busy, that they were for us, and that the clock shows."""
        try:
            columns = self._stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
            ticks = sum(int(columns[place]) for place in _BUSY_COLUMNS)
        except (OSError, ValueError, IndexError):
            return None
        times = os.times()
        return ticks / os.sysconf("SC_CLK_TCK"), times.user + times.system, perf_counter()
