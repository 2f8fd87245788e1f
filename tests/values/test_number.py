"""Tests of decimal arithmetic and of JSON text."""

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InvalidInput
from batchinfer.values.cell import Unrepresentable
from batchinfer.values.number import Number
from batchinfer.values.plain import display_text, json_text, to_json_value
from batchinfer.values.texts import decimal_text
from batchinfer.values.times import date

PRICE = Number("9.99")
LARGE = Number("12345678901234567890123456789012345678.901234567890123456789012345678901234")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (PRICE * 1.2, "11.988"),
        (1.2 * PRICE, "11.988"),
        (PRICE + 1, "10.99"),
        (10.5 - PRICE, "0.51"),
        (PRICE / 3, "3.33"),
        (1 / Number(3), "0." + "3" * 28),
        (Number(7) // 2, "3"),
        (Number(-7) // 2, "-4"),
        (Number(-7) % 3, "2"),
        (PRICE**2, "99.8001"),
        (LARGE**2 / LARGE, str(LARGE)),
        (-PRICE, "-9.99"),
        (abs(-PRICE), "9.99"),
        (sum([PRICE, 1, 0.01]), "11.00"),
        (round(Number("2.675"), 2), "2.68"),
        (round(PRICE), "10"),
        (LARGE + 1, "12345678901234567890123456789012345679.901234567890123456789012345678901234"),
        (LARGE * 1, str(LARGE)),
        (round(LARGE, 1), "12345678901234567890123456789012345678.9"),
        (Number("1E+3"), "1000"),
        (Number("0E-7"), "0.0000000"),
        ([PRICE], "[9.99]"),
        (f"{PRICE:.1f}", "10.0"),
        (f"{PRICE:.3f}", "9.990"),
        (f"{PRICE}", "9.99"),
    ],
)
def test_decimal_arithmetic_with_ints_and_floats(found: object, expected: str) -> None:
    assert str(found) == expected


def test_decimal_equals_float_with_the_same_digits() -> None:
    assert PRICE == 9.99 and PRICE != 9.98 and PRICE > 9.98 and PRICE < 10 and PRICE in [1, 9.99] and PRICE < 10.5
    assert float("inf") > PRICE and float("nan") != PRICE and PRICE != "9.99"
    with pytest.raises(TypeError):
        PRICE + "x"
    for divide in (
        lambda: PRICE / 0,
        lambda: PRICE // 0,
        lambda: PRICE % 0,
        lambda: Number(0) / 0,
        lambda: 1 / Number(0),
    ):
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            divide()
    assert float("inf") > PRICE > float("-inf") and not float("nan") < PRICE


numbers = st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12)


@settings(deadline=None, max_examples=200)
@given(a=numbers, b=st.one_of(numbers, st.integers(-(10**9), 10**9)))
def test_sums_and_products_are_exact(a: Decimal, b: Decimal | int) -> None:
    x, scale = Number(a), 10**6
    left, right = int(a * scale), int(Decimal(b) * scale)
    assert (x + b) * scale == left + right and (b - x) * scale == right - left and x * b * scale**2 == left * right
    assert (x < b, x == b) == (left < right, left == right)
    if right:
        assert x // b == left // right and x % b * scale == left % right


def test_json_text_has_all_digits() -> None:
    text = json_text({"a": LARGE, "b": [PRICE, "x"], "c": {"d": Number("1.50")}}, ensure_ascii=False, indent=None)
    assert text == f'{{"a": {LARGE}, "b": [9.99, "x"], "c": {{"d": 1.50}}}}'
    assert json.loads(text, parse_float=Decimal)["a"] == LARGE
    for value in (float("nan"), [float("-inf")], {"x": float("inf")}):
        with pytest.raises(InvalidInput, match="no NaN"):
            json_text(value)
    with pytest.raises(TypeError, match="generator cannot be written"):
        json_text(x for x in "a")


def test_to_json_value_converts_decimals_to_int_and_float() -> None:
    found = to_json_value({"a": Number("5.0"), "b": [Number("0.5"), None, "x"]}, "column 'x'")
    assert found == {"a": 5, "b": [0.5, None, "x"]} and type(found["a"]) is int and type(found["b"][0]) is float
    assert decimal_text(Decimal("1E+2")) == "100"


def test_display_text_of_every_kind_of_cell() -> None:
    far = Unrepresentable("beyond", "+12000-01-01")
    assert [*map(display_text, ("a b", PRICE, date(0), far, 1.5, True, None))] == [
        *("a b", "9.99", "1970-01-01", "+12000-01-01", "1.5", "true", "null")
    ]
    assert display_text([far, {"d": date(0), 5: "ä"}]) == '["+12000-01-01",{"d":"1970-01-01","5":"ä"}]'
