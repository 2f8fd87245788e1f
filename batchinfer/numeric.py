"""Numbers as people, programs and tables write them. Text is none, and neither is true."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

_DIGITS = 40  # a decimal with more of them before its point stays one: no field takes such a number


def whole(value: Any) -> Any:
    """5.0, Decimal("5") and other libraries' integers as the int that they are; anything else as it is."""
    kind = type(value)
    if kind is int or kind is bool:
        return value
    if isinstance(value, Decimal):
        small = value.is_finite() and value.adjusted() < _DIGITS
        return int(value) if small and value == value.to_integral_value() else value
    if isinstance(value, Integral):
        return int(value)
    size = number(value)  # neither infinity nor NaN is an integer
    return int(size) if size is not None and math.isfinite(size) and size == int(size) else value


def number(value: Any) -> int | float | None:
    """A value as an int or a float; None if it is no number. What a float cannot hold is infinite."""
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        size = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except ValueError:  # a signalling NaN
        return math.nan
    return int(value) if isinstance(value, Integral) else size
