"""Choice of a backend: the first of a device's table entry that can serve on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from batchinfer_kernels.contract import Fallback

from batchinfer.log import log
from batchinfer.ops.backend import Backend, BackendModule
from batchinfer.ops.devices import AUTO, BACKENDS, candidate_devices

if TYPE_CHECKING:  # the shipped backends satisfy the protocol
    from batchinfer_kernels import cpu, eager, triton

    _CHECKED: tuple[BackendModule, ...] = (cpu, eager, triton)


def load_backend(device: str = AUTO) -> Backend:
    """Return the best backend of a device; of the best device that one serves for `auto`.

    Better backends of the same device that cannot serve here are logged. Raises ValueError, with why, if none can.
    """
    problems: list[str] = []
    for name in candidate_devices(device):
        first = len(problems)
        for module in _modules(name):
            why = module.problem(name)
            if why is None:
                _warn_of_slower(name, problems[first:])
                return module.make_backend(name, log_fallback)
            problems.append(why)
    raise ValueError(f"no backend of {device} can serve on this machine: {'; '.join(problems)}")


def _warn_of_slower(device: str, problems: list[str]) -> None:
    """Log why better backends of a device cannot serve."""
    for why in problems:
        log.warning("a slower backend serves this device", device=device, why=why)


def serving_device(device: str = AUTO) -> str:
    """Return the device of the backend that `load_backend` returns. Raises ValueError if none can serve."""
    for name in candidate_devices(device):
        if any(module.problem(name) is None for module in _modules(name)):
            return name
    raise ValueError(f"no backend of {device} can serve on this machine")


def available_backends(device: str = AUTO) -> list[Backend]:
    """Return all backends of the device that `load_backend` chooses which can serve here, the best first."""
    for name in candidate_devices(device):
        usable = [module for module in _modules(name) if module.problem(name) is None]
        if usable:
            return [module.make_backend(name, log_fallback) for module in usable]
    return []


def log_fallback(fallback: Fallback) -> None:
    """Log that an op is done by a slower backend. A backend calls it once for each kind of fallback."""
    log.warning(f"{fallback.op} falls back to slower code", **fallback._asdict())


def _modules(device: str) -> Iterator[BackendModule]:
    """Import a device's backends one by one: a slower one stays unloaded if it is not needed."""
    for name in BACKENDS[device]:
        module: Any = import_module(name)
        yield module
