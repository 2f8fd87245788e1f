"""Choice of a backend: the first of a device's table entry that can serve on this machine."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from batchinfer_kernels.contract import Fallback

from batchinfer.log import log
from batchinfer.ops.backend import Backend
from batchinfer.ops.devices import AUTO, BACKENDS, resolve_device

if TYPE_CHECKING:  # the shipped backends satisfy the protocol
    from batchinfer_kernels import cpu, eager

    _CHECKED: tuple[type[Backend], ...] = (cpu.CPUBackend, eager.EagerBackend)


def load_backend(device: str = AUTO) -> Backend:
    """Return the best backend of a device. Better ones that cannot serve here are logged. Raises ValueError."""
    device = resolve_device(device)
    for module in _modules(device):
        why = module.problem()
        if why is None:
            made: Backend = module.make_backend(device, log_fallback)
            return made
        log.warning("a slower backend serves this device", device=device, why=why)
    raise ValueError(f"no backend of {device} can serve on this machine")


def available_backends(device: str = AUTO) -> list[Backend]:
    """Return every backend of a device that can serve on this machine, the best first; for benchmarks and tests."""
    device = resolve_device(device)
    usable = [module for module in _modules(device) if module.problem() is None]
    return [module.make_backend(device, log_fallback) for module in usable]


def log_fallback(fallback: Fallback) -> None:
    """Log that an op is done by a slower backend. A backend calls it once for each kind of fallback."""
    log.warning(f"{fallback.op} falls back to slower code", **{**fallback._asdict(), "op": fallback.op})


def _modules(device: str) -> list[ModuleType]:
    return [import_module(name) for name in BACKENDS[device]]
