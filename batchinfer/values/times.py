"""Dates, times and durations as Python classes with nanoseconds that print as ISO 8601.

Integers count nanoseconds, since 1970-01-01 for timestamps and since midnight for times of day. Values outside the
range of Python's classes become Unrepresentable, with their exact text.
"""

from __future__ import annotations

import datetime
import functools
import re
import zoneinfo
from collections.abc import Callable
from typing import Any, TypeVar

from batchinfer.values.cell import Unrepresentable
from batchinfer.values.texts import DAY, SECOND, date_text, duration_text, time_text, timestamp_text

_EPOCH_DAY = 719_163  # as datetime.date.toordinal counts 1970-01-01
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d)")


def _below(value: Any) -> int:
    """Return the nanoseconds below the microsecond, 0 to 999."""
    below: int = getattr(value, "nanosecond", 0)
    return below


class Date(datetime.date):
    """A date that never equals a timestamp and raises TypeError when ordered against one."""

    def __repr__(self) -> str:
        return repr(str(self))

    def __sub__(self, other: Any) -> Any:
        return _as_duration(super().__sub__(other))


def _between_days(compare: Callable[[Any, Any], Any]) -> Callable[[Date, Any], Any]:
    return lambda day, other: NotImplemented if isinstance(other, datetime.datetime) else compare(day, other)


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Date, _name, _between_days(getattr(datetime.date, _name)))


class Time(datetime.time):
    """A time of day. `nanosecond`: nanoseconds below the microsecond, 0 to 999."""

    nanosecond = 0

    def isoformat(self, timespec: str = "auto") -> str:
        if timespec == "auto" and self.nanosecond:
            return f"{super().isoformat('microseconds')}{self.nanosecond:03d}"
        return super().isoformat(timespec)

    def __str__(self) -> str:
        return self.isoformat()

    def __repr__(self) -> str:
        return repr(str(self))

    def __eq__(self, other: object) -> Any:
        return super().__eq__(other) and _below(self) == _below(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: datetime.time) -> bool:
        return _below(self) < _below(other) if super().__eq__(other) is True else super().__lt__(other)

    def __le__(self, other: datetime.time) -> bool:
        return self == other or self < other

    def __gt__(self, other: datetime.time) -> bool:
        return not self <= other

    def __ge__(self, other: datetime.time) -> bool:
        return not self < other

    def __hash__(self) -> int:
        return super().__hash__() + self.nanosecond


class Duration(datetime.timedelta):
    """A duration. `nanosecond`: nanoseconds to add to the timedelta's value, 0 to 999."""

    nanosecond = 0

    def __str__(self) -> str:
        return duration_text(_nanos(self))

    def __repr__(self) -> str:
        return repr(str(self))

    def __add__(self, other: Any) -> Any:
        return _exact(_nanos(self) + _nanos(other)) if isinstance(other, datetime.timedelta) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _exact(_nanos(self) - _nanos(other)) if isinstance(other, datetime.timedelta) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return _exact(_nanos(other) - _nanos(self)) if isinstance(other, datetime.timedelta) else NotImplemented

    def __neg__(self) -> Duration:
        return _exact(-_nanos(self))

    def __abs__(self) -> Duration:
        return _exact(abs(_nanos(self)))

    def __mul__(self, other: Any) -> Any:
        return _exact(round(_nanos(self) * other)) if isinstance(other, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, datetime.timedelta):
            return _nanos(self) / _nanos(other)
        return _exact(round(_nanos(self) / other)) if isinstance(other, int | float) else NotImplemented

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, datetime.timedelta):
            return _nanos(self) // _nanos(other)
        return _exact(_nanos(self) // other) if isinstance(other, int) else NotImplemented

    def __mod__(self, other: Any) -> Any:
        return _exact(_nanos(self) % _nanos(other)) if isinstance(other, datetime.timedelta) else NotImplemented

    def __eq__(self, other: object) -> Any:
        return _nanos(self) == _nanos(other) if isinstance(other, datetime.timedelta) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: datetime.timedelta) -> Any:
        return _nanos(self) < _nanos(other) if isinstance(other, datetime.timedelta) else NotImplemented

    def __le__(self, other: datetime.timedelta) -> Any:
        return _nanos(self) <= _nanos(other) if isinstance(other, datetime.timedelta) else NotImplemented

    def __gt__(self, other: datetime.timedelta) -> Any:
        return _nanos(self) > _nanos(other) if isinstance(other, datetime.timedelta) else NotImplemented

    def __ge__(self, other: datetime.timedelta) -> Any:
        return _nanos(self) >= _nanos(other) if isinstance(other, datetime.timedelta) else NotImplemented

    def __hash__(self) -> int:
        return super().__hash__() + self.nanosecond


def _nanos(span: datetime.timedelta) -> int:
    return (span.days * 86_400 + span.seconds) * SECOND + span.microseconds * 1000 + _below(span)


def _exact(nanos: int) -> Duration:
    """Return a Duration. Raises OverflowError beyond 999,999,999 days."""
    micros, below = divmod(nanos, 1000)
    span = Duration(microseconds=micros)
    if below:
        span.nanosecond = below
    return span


def _as_duration(value: Any) -> Any:
    return _exact(_nanos(value)) if isinstance(value, datetime.timedelta) else value


class Timestamp(datetime.datetime):
    """A point in time. `nanosecond`: nanoseconds below the microsecond, 0 to 999.

    Comparison and addition use absolute time. Python's datetime uses wall-clock time within one zone, which repeats an
    hour in autumn.
    """

    nanosecond = 0

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        if timespec == "auto" and self.nanosecond:
            text = super().isoformat(sep, "microseconds")
            return f"{text[:26]}{self.nanosecond:03d}{text[26:]}"
        return super().isoformat(sep, timespec)

    def __str__(self) -> str:
        return self.isoformat()

    def __repr__(self) -> str:
        return repr(str(self))

    def date(self) -> Date:
        return Date(self.year, self.month, self.day)

    def time(self) -> Time:
        return _with_below(Time(self.hour, self.minute, self.second, self.microsecond), self.nanosecond)

    def timetz(self) -> Time:
        return _with_below(self.time().replace(tzinfo=self.tzinfo, fold=self.fold), self.nanosecond)

    def replace(self, *args: Any, **changes: Any) -> Timestamp:
        below = 0 if "microsecond" in changes or len(args) > 6 else self.nanosecond
        return _with_below(super().replace(*args, **changes), below)

    def astimezone(self, tz: datetime.tzinfo | None = None) -> Timestamp:
        same = timestamp(self._after(_EPOCH_UTC), tz) if tz is not None and self.tzinfo is not None else None
        return same if isinstance(same, Timestamp) else _with_below(super().astimezone(tz), self.nanosecond)

    def utcoffset(self) -> Duration | None:
        offset = super().utcoffset()
        return None if offset is None else _as_duration(offset)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, datetime.timedelta):
            return NotImplemented
        if _changes(self.tzinfo):
            return timestamp(self._after(_EPOCH_UTC) + _nanos(other), self.tzinfo)
        carried, below = divmod(self.nanosecond + _below(other), 1000)
        span = datetime.timedelta(other.days, other.seconds, other.microseconds + carried)
        return _with_below(super().__add__(span), below)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, datetime.timedelta):
            return self + _exact(-_nanos(other))
        return _exact(self._after(other)) if isinstance(other, datetime.datetime) else NotImplemented

    def __rsub__(self, other: datetime.datetime) -> Any:
        return _exact(-self._after(other)) if isinstance(other, datetime.datetime) else NotImplemented

    def _after(self, other: Any) -> int:
        """Return the nanoseconds from `other` to this time. Raises TypeError if only one of the two has a zone."""
        if (self.tzinfo is None) is not (other.tzinfo is None):
            raise TypeError("one of the times has a zone, the other does not")
        nanos = _nanos(super().__sub__(other)) + self.nanosecond - _below(other)
        if self.tzinfo is other.tzinfo and _changes(self.tzinfo):
            nanos += _offset(other) - _offset(self)
        return nanos

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, datetime.datetime) or (self.tzinfo is None) is not (other.tzinfo is None):
            return NotImplemented
        return not self._after(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: datetime.datetime) -> bool:  # type: ignore[override]
        return self._after(other) < 0 if isinstance(other, datetime.datetime) else NotImplemented

    def __le__(self, other: datetime.datetime) -> bool:  # type: ignore[override]
        return self._after(other) <= 0 if isinstance(other, datetime.datetime) else NotImplemented

    def __gt__(self, other: datetime.datetime) -> bool:  # type: ignore[override]
        return self._after(other) > 0 if isinstance(other, datetime.datetime) else NotImplemented

    def __ge__(self, other: datetime.datetime) -> bool:  # type: ignore[override]
        return self._after(other) >= 0 if isinstance(other, datetime.datetime) else NotImplemented

    def __hash__(self) -> int:
        if self.fold and _changes(self.tzinfo):
            return hash(self.astimezone(datetime.UTC))
        return super().__hash__() + self.nanosecond


def _offset(moment: datetime.datetime) -> int:
    offset = moment.utcoffset()
    return 0 if offset is None else _nanos(offset)


def _changes(zone: datetime.tzinfo | None) -> bool:
    """Return True if the zone's UTC offset depends on the date."""
    return zone is not None and type(zone) is not datetime.timezone


M = TypeVar("M", Time, Timestamp)


def _with_below(value: M, below: int) -> M:
    if below:
        value.nanosecond = below
    return value


# -- from Arrow's integers ----------------------------------------------------------------------------------------


def date(days: int) -> Date | Unrepresentable:
    """Return the date `days` after 1970-01-01."""
    try:
        return Date.fromordinal(days + _EPOCH_DAY)
    except (ValueError, OverflowError):
        return _far("date", date_text(days))


def time(nanos: int) -> Time | Unrepresentable:
    if not 0 <= nanos < DAY:
        return Unrepresentable(f"the time {time_text(nanos)} is beyond a day", time_text(nanos))
    micros, below = divmod(nanos, 1000)
    seconds, micros = divmod(micros, 1_000_000)
    return _with_below(Time(seconds // 3600, seconds // 60 % 60, seconds % 60, micros), below)


def duration(nanos: int) -> Duration | Unrepresentable:
    try:
        return _exact(nanos)
    except OverflowError:
        text = duration_text(nanos)
        return Unrepresentable(f"the duration {text} is beyond 999,999,999 days", text)


_EPOCH = Timestamp(1970, 1, 1)
_EPOCH_UTC = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
Zone = datetime.tzinfo | str | None


def zone_of(name: str | None) -> Zone:
    """Return the time zone of a column: its name if the zone is unknown, None for local time without a zone."""
    if not name:
        return None
    if name.upper() in ("UTC", "Z"):
        return datetime.UTC
    offset = _OFFSET.fullmatch(name)
    if offset is not None:
        span = datetime.timedelta(hours=int(offset[2]), minutes=int(offset[3]))
        return datetime.timezone(span if offset[1] == "+" else -span) if span.days < 1 else name
    return _named_zone(name)


@functools.cache
def _named_zone(name: str) -> Zone:
    try:
        return zoneinfo.ZoneInfo(name)
    except (LookupError, ValueError, OSError):  # the name of a folder of the zone database raises OSError
        return name


def timestamp(nanos: int, zone: Zone = None) -> Timestamp | Unrepresentable:
    """Return a timestamp, in local time with its UTC offset if it has a zone."""
    if isinstance(zone, str):
        text = timestamp_text(nanos, True)
        return Unrepresentable(f"the time zone {zone!r} is not known (the time in UTC is {text})", text)
    micros, below = divmod(nanos, 1000)
    try:
        span = datetime.timedelta(microseconds=micros)
        if zone is None:
            return _with_below(datetime.datetime.__add__(_EPOCH, span), below)
        local = (_EPOCH_UTC + span).astimezone(zone)
    except OverflowError:
        return _far("time", timestamp_text(nanos, zone is not None))
    moment = Timestamp.combine(local.date(), local.timetz())
    if local.fold:
        moment = moment.replace(fold=1)  # `combine` drops it
    return _with_below(moment, below)


def _far(what: str, text: str) -> Unrepresentable:
    return Unrepresentable(f"the {what} {text} is beyond the years 1 to 9999", text)
