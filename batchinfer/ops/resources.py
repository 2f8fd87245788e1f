"""Resources of the host: free memory, the share a KV cache may take, threads within the quota."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

HOST = torch.device("cpu")
"""Where files are read, plans are made and tokens are handed out, whatever device computes."""

KV_CACHE_SHARE = 0.25
"""Share of the host's free memory that a KV cache may take by default: the rest is for whatever else runs there."""


def free_bytes(root: Path = Path("/")) -> int:
    """Return the memory of the host that can be allocated now, within the container's limit."""
    return min([_machine_free_bytes(root), *_cgroup_free_bytes(root)])


def _machine_free_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    # no Linux: half of what is built in
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_free_bytes(root: Path) -> list[int]:
    """Return what the limits of cgroup v2 and v1 leave, as a container sees its own; reclaimable page cache is free."""
    left = []
    for limit_file, used_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        folder = root / "sys/fs/cgroup"
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
            stat = dict(line.split() for line in (folder / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # none, or the word "max"
            continue
        left.append(max(0, limit - used + int(stat.get("inactive_file", 0))))
    return left


def use_threads(count: int | None) -> None:
    """Set the threads that torch and compiled kernels use in this process; None: cores, within the quota."""
    torch.set_num_threads(count or min(torch.get_num_threads(), quota_threads()))


def quota_threads(root: Path = Path("/")) -> int:
    """Return the threads that the container's quota keeps busy (cgroup v2, v1); torch itself counts cores."""
    folder = root / "sys/fs/cgroup"
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu/cpu.cfs_quota_us").read_text()
            period = (folder / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return sys.maxsize
    try:
        shares = int(quota) / int(period)
    except ValueError:  # the word "max"
        return sys.maxsize
    return max(1, int(shares)) if shares > 0 else sys.maxsize
