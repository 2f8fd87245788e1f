"""Device as a job's fingerprint names it: the default number formats of an output depend on it."""

from __future__ import annotations

from pathlib import Path

from batchinfer.ops.devices import AUTO, candidate_devices

_HOST = "cpu"
_DRIVERS = {"cuda": ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")}
"""Name of a device → files of which a machine has one if its driver is loaded (NVIDIA, Tegra, Windows' Linux, AMD)."""


def fingerprint_device(name: str) -> str | None:
    """Return the device that `name` stands for on this machine, None for the host's processor.

    Loads torch only if a driver of another device is loaded. Raises ValueError if `auto` finds no device at all.
    """
    found = [device for device in candidate_devices(name) if name != AUTO or _may_be_present(device)]
    device = found[0] if len(found) == 1 else _serving_device()
    return None if device == _HOST else device


def _may_be_present(device: str) -> bool:
    return device not in _DRIVERS or any(Path(file).exists() for file in _DRIVERS[device])


def _serving_device() -> str:
    from batchinfer.ops.choose import serving_device  # loads torch

    return serving_device()
