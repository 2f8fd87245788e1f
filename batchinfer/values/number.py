"""Decimal numbers that compute with every other number."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation
from typing import Any

from batchinfer.values.texts import decimal_text

_TRAPS = [DivisionByZero, InvalidOperation]
# sums and products of what a column can hold, 76 digits, and of any float are exact
_EXACT = Context(prec=1000, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=_TRAPS)
_QUOTIENT_DIGITS = 28


class Number(Decimal):
    """A decimal number. A float beside it counts as the number that it is written as: 0.1 is one tenth."""

    def __str__(self) -> str:
        return decimal_text(self)

    def __repr__(self) -> str:
        return str(self)

    def __format__(self, layout: str, *_: Any) -> str:
        return super().__format__(layout) if layout else str(self)

    def __round__(self, digits: int | None = None) -> Any:
        rounded = self.quantize(Decimal(1).scaleb(-(digits or 0)), ROUND_HALF_EVEN, _EXACT)
        return int(rounded) if digits is None else Number(rounded)

    def __neg__(self) -> Number:
        return Number(self.copy_negate())

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return Number(self.copy_abs())

    def __hash__(self) -> int:
        return super().__hash__()


def plain_number(value: Decimal) -> int | float:
    """What JSON's readers make of it."""
    return int(value) if value == value.to_integral_value() else float(value)


def _operand(value: Any) -> Decimal | None:
    if isinstance(value, float):
        return Decimal(repr(value))
    return Decimal(value) if isinstance(value, int | Decimal) else None


def _quotient(left: Decimal, right: Decimal) -> Decimal:
    digits = max(_QUOTIENT_DIGITS, len(left.as_tuple().digits), len(right.as_tuple().digits))
    return Context(digits, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=_TRAPS).divide(left, right)


def _power(left: Decimal, right: Decimal) -> Decimal:
    return Context(_QUOTIENT_DIGITS, traps=_TRAPS).power(left, right)


def _remainder(left: Decimal, right: Decimal) -> Decimal:
    """With the divisor's sign, as Python's integers and floats have it."""
    rest = _EXACT.remainder(left, right)
    return _EXACT.add(rest, right) if rest and (rest < 0) is not (right < 0) else rest


def _whole(left: Decimal, right: Decimal) -> Decimal:
    return _EXACT.divide_int(_EXACT.subtract(left, _remainder(left, right)), right)


_OPERATORS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "add": _EXACT.add,
    "sub": _EXACT.subtract,
    "mul": _EXACT.multiply,
    "truediv": _quotient,
    "floordiv": _whole,
    "mod": _remainder,
    "pow": _power,
}


def _binary(compute: Callable[[Decimal, Decimal], Decimal], reflected: bool) -> Callable[[Number, Any], Any]:
    def operator(self: Number, other: Any) -> Any:
        operand = _operand(other)
        if operand is None:
            return NotImplemented
        return Number(compute(operand, self) if reflected else compute(self, operand))

    return operator


def _comparison(name: str) -> Callable[[Number, Any], Any]:
    compare = getattr(Decimal, name)

    def operator(self: Number, other: Any) -> Any:
        return compare(self, Decimal(repr(other)) if isinstance(other, float) and math.isfinite(other) else other)

    return operator


for _name, _compute in _OPERATORS.items():
    setattr(Number, f"__{_name}__", _binary(_compute, False))
    setattr(Number, f"__r{_name}__", _binary(_compute, True))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Number, _name, _comparison(_name))
