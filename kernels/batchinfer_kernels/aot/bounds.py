"""Upper bounds of registers and shared memory: a Markdown table, one row per kernel, one column per target.

A cell is "registers / KiB of shared memory", or "–" where the target has no such kernel. The table is the only one of
its page whose first heading is "kernel, registers / KiB".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import NamedTuple

from batchinfer_kernels.triton.targets import Target

PAGE = Path(__file__).parents[3] / "docs" / "design" / "kernels-gpu.md"
_HEADING = "kernel, registers / KiB"
_NONE = "–"


class Bound(NamedTuple):
    """Most registers of a thread and most KiB of shared memory of a program that a kernel may take."""

    registers: int
    shared_kib: int


Bounds = dict[str, dict[str, Bound]]  # kernel → target


class BoundsError(Exception):
    """The table of bounds is missing or cannot be read."""


def read_bounds(page: Path) -> Bounds:
    """Return the table of a page. Raises BoundsError."""
    if not page.is_file():
        raise BoundsError(f"{page} does not exist: the table of bounds lies in the repository; run from a checkout")
    rows = [_cells(line) for line in _table(page.read_text("utf-8"))]
    if len(rows) < 2:
        raise BoundsError(f"{page} has no table whose first heading is {_HEADING!r}")
    targets = rows[0][1:]
    bounds: Bounds = {}
    for name, *cells in rows[2:]:
        if len(cells) != len(targets):
            raise BoundsError(f"{page}: the row of {name} has {len(cells)} cells beside its name, not {len(targets)}")
        bounds[name] = {
            target: _bound(cell, name, page) for target, cell in zip(targets, cells, strict=True) if cell != _NONE
        }
    return bounds


def write_bounds(page: Path, bounds: Mapping[str, Mapping[str, Bound]], targets: list[str]) -> None:
    """Replace the table of a page. Raises BoundsError if there is none."""
    read_bounds(page)
    lines = [f"| {_HEADING} | {' | '.join(targets)} |", "| --- |" + " ---: |" * len(targets)]
    for name, of_kernel in sorted(bounds.items()):
        cells = [f"{b.registers} / {b.shared_kib}" if (b := of_kernel.get(target)) else _NONE for target in targets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = page.read_text("utf-8")
    page.write_text(text.replace("\n".join(_table(text)), "\n".join(lines)), "utf-8")


def bound_with_margin(registers: int, shared_bytes: int, target: Target) -> Bound:
    """Return a bound for figures, with room for what other versions of Triton make of the same kernel.

    That is an eighth, and for registers on AMD a quarter; rounded up to 8 registers and to whole KiB.
    """
    room, most = (1.25, 512) if target.backend == "hip" else (1.125, 255)
    return Bound(
        min(math.ceil(registers * room / 8) * 8, most),
        math.ceil(shared_bytes * 1.125 / 1024),
    )


def _table(text: str) -> list[str]:
    from_heading = dropwhile(lambda line: not line.startswith(f"| {_HEADING} |"), text.splitlines())
    return list(takewhile(lambda line: line.startswith("|"), from_heading))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _bound(cell: str, name: str, page: Path) -> Bound:
    registers, _, shared = cell.partition("/")
    try:
        return Bound(int(registers), int(shared))
    except ValueError:
        raise BoundsError(f"{page}: the row of {name} has the cell {cell!r}, which is not 'registers / KiB'") from None
