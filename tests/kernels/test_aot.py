"""Ahead-of-time gate: planted faults make it fail, each with its message. `make aot` runs it on all kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from batchinfer_kernels.aot.bounds import PAGE, Bound, BoundsError, bound_with_margin, read_bounds, write_bounds
from batchinfer_kernels.aot.gate import jobs_of, kernel_modules, kernels_without_case
from batchinfer_kernels.triton.targets import TARGETS

_TABLE = """
| kernel, registers / KiB | sm_80 | gfx942 |
| --- | ---: | ---: |
| good | 255 / 200 | – |
| without MMA | 255 / 200 | 64 / 8 |
| single stage | 255 / 200 | – |
| spilling | 255 / 200 | – |
| greedy | 32 / 0 | – |
| typo | 255 / 200 | – |

Text after it.
"""


def test_planted_faults_make_the_gate_fail(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "page.md").write_text(_TABLE, "utf-8")
    arguments = ["sm_80", "--jobs=1", f"--bounds={tmp_path}/page.md"]
    gate = f"""
import sys
from batchinfer_kernels.aot.__main__ import main
sys.exit(main({arguments}, modules=["tests.kernels.faulty_kernels"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", gate],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    messages = dict(fault.split(" on sm_80: ", 1) for fault in done.stderr.split("FAIL ")[1:])
    assert done.returncode == 1
    assert "good" not in messages
    assert "no tensor-core instruction" in messages["without MMA"]
    assert "no asynchronous copy" in messages["single stage"]
    assert "0 K/V buffers (0 pipelined loads), fewer than 2" in messages["single stage"]
    assert "spilled to local memory" in messages["spilling"]
    assert "registers, above the bound of 32" in messages["greedy"]
    assert "no bound in the table" in messages["unlisted"]
    assert "unknown_name" in messages["typo"]
    assert "7 kernels compiled" in done.stdout


def test_bounds_leave_room_and_end_where_a_thread_s_registers_do() -> None:
    assert bound_with_margin(100, 2048, TARGETS["sm_90"]) == Bound(120, 3)
    assert bound_with_margin(250, 0, TARGETS["sm_90"]) == Bound(255, 0)
    assert bound_with_margin(500, 0, TARGETS["gfx942"]) == Bound(512, 0)


def test_bounds_are_read_and_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Kernels\n{_TABLE}", "utf-8")
    bounds = read_bounds(page)
    assert bounds["greedy"] == {"sm_80": Bound(32, 0)}
    assert bounds["without MMA"] == {"sm_80": Bound(255, 200), "gfx942": Bound(64, 8)}
    bounds["greedy"]["gfx942"] = bound_with_margin(95, 3000, TARGETS["gfx942"])
    write_bounds(page, bounds, ["sm_80", "sm_90", "gfx942"])
    assert read_bounds(page) == bounds
    assert "| greedy | 32 / 0 | – | 120 / 4 |\n" in page.read_text("utf-8")
    assert page.read_text("utf-8").endswith("\n\nText after it.\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Kernels\n", "no table"),
        (_TABLE.replace("255 / 200 | 64 / 8", "255 / 200"), "1 cells beside its name, not 2"),
        (_TABLE.replace("64 / 8", "64"), "the row of without MMA has the cell '64'"),
    ],
)
def test_a_page_without_a_readable_table_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text, "utf-8")
    with pytest.raises(BoundsError, match=message):
        read_bounds(tmp_path / "page.md")


def test_a_missing_page_names_the_checkout(tmp_path: Path) -> None:
    with pytest.raises(BoundsError, match="run from a checkout"):
        read_bounds(tmp_path / "kernels-gpu.md")


def test_every_kernel_has_a_bound_on_every_target() -> None:
    pytest.importorskip("triton")
    bounds = read_bounds(PAGE)
    jobs = jobs_of(kernel_modules(), list(TARGETS), None)
    assert not kernels_without_case(list(TARGETS))
    assert {(job.case, job.target) for job in jobs} == {(name, target) for name in bounds for target in bounds[name]}
