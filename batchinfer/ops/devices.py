"""Table of devices and their backends. Imports no torch: job files are checked against it."""

from __future__ import annotations

from batchinfer.errors import suggest

AUTO = "auto"
BACKENDS: dict[str, tuple[str, ...]] = {
    "cuda": ("batchinfer_kernels.triton", "batchinfer_kernels.eager"),
    "cpu": ("batchinfer_kernels.cpu", "batchinfer_kernels.eager"),
}
"""Name of a device, as torch and `engine.device` know it → modules of its backends; the best of both come first."""


def check_device(name: str) -> None:
    """Raise ValueError, with what there is, unless `name` is `auto` or a device that a backend serves."""
    if name != AUTO and name not in BACKENDS:
        known = (AUTO, *BACKENDS)
        raise ValueError(f"must be one of {', '.join(known)}; no backend serves {name!r}{suggest(name, known)}")


def candidate_devices(name: str) -> tuple[str, ...]:
    """Return the devices to try for `name`, the best first: all of the table for `auto`. Raises ValueError."""
    check_device(name)
    return tuple(BACKENDS) if name == AUTO else (name,)
