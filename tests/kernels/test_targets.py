"""Launch configurations: every kernel has one on every target, and devices map to the target they can run as."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from batchinfer_kernels.triton import targets
from batchinfer_kernels.triton.targets import TARGETS, Target, config, target_of


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kernel", targets._LAUNCHES)
def test_rows_of_any_width_have_a_configuration(kernel: str, target: Target) -> None:
    widths = [launch.up_to_bytes for launch in targets._LAUNCHES[kernel].get(target.name, [])]
    assert widths == sorted(widths)
    for row_bytes in (1, 256, 512, 1024, 65536):
        launch = config(kernel, target, row_bytes)
        assert launch.up_to_bytes >= row_bytes
        assert launch.num_warps * target.warp_size <= 1024


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_devices_run_as_the_nearest_target(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", capability[0] * 10 + capability[1])
    assert target_of(device) is TARGETS[name]


def test_the_table_needs_no_triton() -> None:
    check = "import batchinfer_kernels.triton.targets, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
