"""Decimal numbers that support arithmetic with ints and floats."""

from __future__ import annotations

import math
import operator as python
import re
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation
from typing import Any

from batchinfer.values.texts import decimal_text

_TRAPS = [DivisionByZero, InvalidOperation]
# exact for sums and products of columns' numbers (76 digits) and of any float
_EXACT = Context(prec=1000, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=_TRAPS)
_QUOTIENT_DIGITS = 28
_EXACT_POWERS = 100
# https://docs.python.org/3/library/stdtypes.html#printf-style-string-formatting
_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?(?P<flags>[-+ #0]*)(?P<width>\d*)(?:\.(?P<digits>\d*))?[hlL]?(?P<kind>.)"
)


class Number(Decimal):
    """A decimal number. In arithmetic, a float counts as its shortest decimal form: 0.1 is one tenth."""

    def __str__(self) -> str:
        return decimal_text(self)

    def __repr__(self) -> str:
        return str(self)

    def __format__(self, layout: str, *_: Any) -> str:
        return super().__format__(layout) if layout else str(self)

    def __round__(self, digits: int | None = None) -> Any:
        rounded = self.rounded(digits or 0, ROUND_HALF_EVEN)
        return int(rounded) if digits is None else rounded

    def rounded(self, digits: int, mode: str) -> Number:
        """Round to `digits` places after the point; `mode` is a rounding mode of `decimal`."""
        return Number(self.quantize(Decimal(1).scaleb(-digits), mode, _EXACT))

    def __neg__(self) -> Number:
        return Number(self.copy_negate())

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return Number(self.copy_abs())

    def __hash__(self) -> int:
        return super().__hash__()


def plain_number(value: Decimal) -> int | float:
    """Return the number as JSON parsers read it: an int if it is integral, else a float."""
    return int(value) if value == value.to_integral_value() else float(value)


def format_percent(layout: str, values: Any) -> str:
    """Return `layout % values`, but with a decimal number's exact digits for `%f`, not the nearest double's."""
    positional = values if isinstance(values, tuple) else (values,)
    remaining, rest = iter(positional), []

    def replacement(match: re.Match[str]) -> str:
        if match["kind"] == "%":
            return match[0]
        value = next(remaining, None) if match["key"] is None else values[match["key"]]
        if match["kind"] in "fF" and isinstance(value, Decimal):
            return _format_fixed(value, match)
        if match["key"] is None:
            rest.append(value)
        return match[0]

    text = _CONVERSION.sub(replacement, layout)
    if "*" in layout or len(rest) == len(positional):  # widths that are values, or nothing to replace
        return str(layout % values)
    rest += remaining  # surplus values, for which Python raises
    return str(text % (values if isinstance(values, dict) else tuple(rest)))


def _format_fixed(value: Decimal, match: re.Match[str]) -> str:
    flags = match["flags"]
    sign = "+" if "+" in flags else " " if " " in flags else ""
    fill = "<" if "-" in flags else "0" if "0" in flags else ">"
    digits = 6 if match["digits"] is None else match["digits"] or 0
    width = f"{sign}0{match['width']}" if fill == "0" else f"{fill}{sign}{match['width']}"
    return format(value, f"{width}.{digits}f")


def _operand(value: Any) -> Decimal | None:
    if isinstance(value, float):
        return Decimal(repr(value))
    return Decimal(value) if isinstance(value, int | Decimal) else None


def _quotient(left: Decimal, right: Decimal) -> Decimal:
    digits = max(_QUOTIENT_DIGITS, len(left.as_tuple().digits), len(right.as_tuple().digits))
    return Context(digits, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=_TRAPS).divide(left, right)


def _power(left: Decimal, right: Decimal) -> Decimal:
    exact = 0 <= right <= _EXACT_POWERS and right == right.to_integral_value()
    return (_EXACT if exact else Context(_QUOTIENT_DIGITS, traps=_TRAPS)).power(left, right)


def _remainder(left: Decimal, right: Decimal) -> Decimal:
    """Return the remainder with the divisor's sign, as Python's ints and floats do."""
    rest = _EXACT.remainder(left, right)
    return _EXACT.add(rest, right) if rest and (rest < 0) is not (right < 0) else rest


def _floor_quotient(left: Decimal, right: Decimal) -> Decimal:
    return _EXACT.divide_int(_EXACT.subtract(left, _remainder(left, right)), right)


_OPERATORS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "add": _EXACT.add,
    "sub": _EXACT.subtract,
    "mul": _EXACT.multiply,
    "truediv": _quotient,
    "floordiv": _floor_quotient,
    "mod": _remainder,
    "pow": _power,
}
_DIVISIONS = (_quotient, _floor_quotient, _remainder)


def _binary(compute: Callable[[Decimal, Decimal], Decimal], reflected: bool) -> Callable[[Number, Any], Any]:
    def operator(self: Number, other: Any) -> Any:
        operand = _operand(other)
        if operand is None:
            return NotImplemented
        left, right = (operand, self) if reflected else (self, operand)
        if not right and compute in _DIVISIONS:
            raise ZeroDivisionError("division by zero")
        return Number(compute(left, right))

    return operator


def _comparison(name: str) -> Callable[[Number, Any], Any]:
    compare, of_python = getattr(Decimal, name), getattr(python, name)

    def operator(self: Number, other: Any) -> Any:
        if not isinstance(other, float):
            return compare(self, other)
        return compare(self, Decimal(repr(other))) if math.isfinite(other) else of_python(0.0, other)

    return operator


for _name, _compute in _OPERATORS.items():
    setattr(Number, f"__{_name}__", _binary(_compute, False))
    setattr(Number, f"__r{_name}__", _binary(_compute, True))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Number, _name, _comparison(_name))
