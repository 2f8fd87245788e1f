"""Conversion of numbers from Python, JSON, YAML and tables to int and float. Text and booleans are not numbers."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

_DIGITS = 40  # a Decimal with more integral digits is left alone: no field accepts such a number


def to_integer(value: Any) -> Any:
    """Return integral values (5.0, Decimal("5"), other libraries' integers) as int and anything else unchanged."""
    kind = type(value)
    if kind is int or kind is bool:
        return value
    if isinstance(value, Decimal):
        small = value.is_finite() and value.adjusted() < _DIGITS
        return int(value) if small and value == value.to_integral_value() else value
    if isinstance(value, Integral):
        return int(value)
    size = to_number(value)  # neither infinity nor NaN is an integer
    return int(size) if size is not None and math.isfinite(size) and size == int(size) else value


def to_number(value: Any) -> int | float | None:
    """Return a value as int or float, or None if it is not a number.

    Numbers outside the range of a float become infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        size = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except ValueError:  # a signalling NaN
        return math.nan
    return int(value) if isinstance(value, Integral) else size
