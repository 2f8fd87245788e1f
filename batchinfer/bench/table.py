"""Text tables with aligned columns."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format columns two spaces apart; the first `left` columns are left-aligned, the rest right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *rows]
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Format one line per pair: a name and its text, aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in pairs)


def number(value: float) -> str:
    """Format three significant digits, or all digits before the point: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, places)}f}"
