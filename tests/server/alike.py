"""Comparison of JSON bodies that came from steps of different batch shapes."""

from __future__ import annotations

from typing import Any


def alike(one: Any, other: Any, plain_torch: bool) -> bool:
    """Return True if equal; in plain torch up to a float's last bits, as its sums depend on the number of rows."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= (1e-5 if plain_torch else 0.0)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name], plain_torch) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(alike(a, b, plain_torch) for a, b in zip(one, other, strict=True))
    return one == other
