"""Tests of dates, times and durations: text, zones and arithmetic with nanoseconds."""

import datetime
import zoneinfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InvalidInput
from batchinfer.values.cell import Unrepresentable
from batchinfer.values.texts import duration_text, interval_text, timestamp_text
from batchinfer.values.times import Timestamp, date, duration, time, timestamp, zone_of
from tests.io.arrow_types import iso

NANOS = st.integers(-(2**63) + 1, 2**63 - 1)
SPANS = st.integers(-(10**15), 10**15)


END = 253402300800 * 10**9  # of the year 9999


@settings(deadline=None, max_examples=200)
@given(nanos=NANOS)
@example(nanos=-1)
def test_timestamp_text_equals_arrows(nanos: int) -> None:
    assert timestamp_text(nanos, False) == str(timestamp(nanos)) == iso(nanos, "ns")


def test_timestamp_after_the_year_9999_is_unrepresentable() -> None:
    assert str(timestamp(END - 1)) == timestamp_text(END - 1, False) == "9999-12-31T23:59:59.999999999"
    after = timestamp(END)
    assert isinstance(after, Unrepresentable) and after.text == "+10000-01-01T00:00:00"


@pytest.mark.parametrize("unit", ["s", "ms"])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_timestamp_text_beyond_the_year_9999_equals_arrows(unit: str, data: st.DataObject) -> None:
    value = data.draw(st.integers(-(10**14), 10**14))
    assert timestamp_text(value * {"s": 10**9, "ms": 10**6}[unit], True) == iso(value, unit, True)


def test_zoned_timestamp_is_local_time_with_offset() -> None:
    winter = 1_700_000_000 * 10**9 + 7
    assert str(timestamp(winter, zone_of("Europe/Berlin"))) == "2023-11-14T23:13:20.000000007+01:00"
    assert str(timestamp(0, zone_of("+05:30"))) == "1970-01-01T05:30:00+05:30"
    assert str(timestamp(0, zone_of("UTC"))) == str(timestamp(0, zone_of("Etc/UTC"))) == "1970-01-01T00:00:00+00:00"
    for name in ("Mars/Phobos", "../etc/passwd", "Europe", "+99:00", "\ud800", "a\0"):
        unknown = timestamp(winter, zone_of(name))
        assert isinstance(unknown, Unrepresentable) and unknown.text == "2023-11-14T22:13:20.000000007+00:00"


def test_zone_is_found_without_a_system_database() -> None:
    zoneinfo.reset_tzpath(to=())
    try:
        assert zone_of("Pacific/Chatham") == zoneinfo.ZoneInfo("Pacific/Chatham")
        assert str(timestamp(0, zone_of("Pacific/Marquesas"))).endswith("-09:30")
    finally:
        zoneinfo.reset_tzpath()


AUTUMN = 1_698_541_200 * 10**9  # 2023-10-29, when clocks in Berlin show 02:00 for the second time


@settings(deadline=None, max_examples=100)
@given(
    one=st.integers(AUTUMN - 10**13, AUTUMN + 10**13),
    other=st.integers(AUTUMN - 10**13, AUTUMN + 10**13),
    zones=st.tuples(*[st.sampled_from(["Europe/Berlin", "Europe/Lisbon", "UTC", "+02:00"])] * 2),
)
@example(one=AUTUMN, other=AUTUMN - 3600 * 10**9, zones=("Europe/Berlin", "Europe/Berlin"))
@example(one=AUTUMN, other=AUTUMN, zones=("Europe/Berlin", "UTC"))
def test_arithmetic_in_the_repeated_autumn_hour_is_absolute(one: int, other: int, zones: tuple[str, str]) -> None:
    a, b = timestamp(one, zone_of(zones[0])), timestamp(other, zone_of(zones[1]))
    assert isinstance(a, Timestamp) and isinstance(b, Timestamp)
    for moment, nanos, zone in ((a, one, zones[0]), (b, other, zones[1])):
        of_python = datetime.datetime.fromtimestamp(nanos // 10**9, datetime.UTC).astimezone(zone_of(zone))
        assert str(moment)[:19] + str(moment)[-6:] == of_python.isoformat()
        assert moment.timetz().isoformat("seconds")[:8] == of_python.time().isoformat()
    assert (a < b, a <= b, a == b, a > b, a >= b) == (
        *(one < other, one <= other, one == other, one > other, one >= other),
    )
    assert str(a - b) == duration_text(one - other) and b + (a - b) == a and a - (a - b) == b
    assert one != other or hash(a) == hash(b)
    assert a.astimezone(b.tzinfo) == a and str((a + (b - a)).astimezone(b.tzinfo)) == str(b)


def test_date_does_not_compare_with_timestamp() -> None:
    day, moment = date(19_723), timestamp(19_723 * 86_400 * 10**9)
    assert day != moment and moment != day
    for compare in (lambda: day < moment, lambda: moment < day, lambda: day >= moment):
        with pytest.raises(TypeError, match="not supported between"):
            compare()


def test_duration_division_keeps_nanoseconds() -> None:
    span = duration(7 * 10**9 + 1)
    assert str(span // 2) == "PT3.5S" and str(span % duration(10**9)) == "PT0.000000001S"
    assert span // duration(10**9) == 7


def test_timestamp_is_a_datetime_with_nanoseconds() -> None:
    at = timestamp(1_700_000_000 * 10**9 + 123_456_789)
    assert isinstance(at, Timestamp)
    assert (at.year, at.strftime("%H:%M"), at.microsecond, at.nanosecond) == (2023, "22:13", 123456, 789)
    assert f"{at}" == str(at) == "2023-11-14T22:13:20.123456789"
    assert str([at, at.date(), at.time()]) == "['2023-11-14T22:13:20.123456789', '2023-11-14', '22:13:20.123456789']"
    assert str(at.replace(year=2000)) == "2000-11-14T22:13:20.123456789"
    assert str(at.astimezone(datetime.UTC)).endswith("789+00:00")
    plain = timestamp(1_700_000_000 * 10**9 + 123_456_000)
    assert plain == datetime.datetime(2023, 11, 14, 22, 13, 20, 123456) and hash(plain) == hash(at.replace()) - 789
    assert plain < at and at > plain and at >= plain and plain <= at and plain != at


@settings(deadline=None, max_examples=100)
@given(start=SPANS, span=SPANS, other=SPANS)
def test_duration_arithmetic_is_exact(start: int, span: int, other: int) -> None:
    a, b, c = timestamp(start), duration(span), duration(other)
    assert str(a + b) == str(b + a) == timestamp_text(start + span, False)
    assert str(a - b) == timestamp_text(start - span, False)
    assert str((a + b) - a) == str(b) == duration_text(span)
    assert str(b + c) == duration_text(span + other) and str(b - c) == duration_text(span - other)
    assert str(-b) == duration_text(-span) and str(abs(b)) == duration_text(abs(span)) and str(b * 3) == str(b + b + b)
    assert (b < c, b <= c, b == c, b > c, b >= c) == (
        *(span < other, span <= other, span == other, span > other, span >= other),
    )
    assert (a + b < a + c) == (span < other) and (a + b == a + c) == (span == other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration_text(0), "PT0S"),
        (duration_text(-1), "-PT0.000000001S"),
        (duration_text(90_061 * 10**9 + 5 * 10**8), "P1DT1H1M1.5S"),
        (interval_text(14, 3, 4 * 10**9), "P1Y2M3DT4S"),
        (interval_text(-1, 0, -90 * 10**9), "P-1MT-1M-30S"),
        (str(date(-719_162)), "0001-01-01"),
        (str(time(86_399_999_999_999)), "23:59:59.999999999"),
    ],
)
def test_iso_8601_text(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (date(-719_163), "0000-12-31"),
        (date(10**9), "+2739877-01-03"),
        (date(-(10**6)), "-0768-02-04"),
        (time(86_400 * 10**9), "24:00:00"),
        (time(-1), "-00:00:00.000000001"),
        (duration(2**62 * 10**9), "P53375995583650DT7H45M4S"),
    ],
)
def test_use_of_an_unrepresentable_cell_raises_invalid_input(cell: Unrepresentable, text: str) -> None:
    assert cell.text == text
    uses = [str, repr, bool, len, iter, int, float, lambda x: x == x, lambda x: x < 1, lambda x: x + 1, lambda x: x - x]
    for use in [*uses, lambda x: f"{x}", lambda x: x[0], lambda x: 1 in x]:
        with pytest.raises(InvalidInput, match="beyond"):
            use(cell)
