"""ISO 8601 text by integer arithmetic, for every time of 64 bits: Python's own classes end with the year 9999.

Integers count nanoseconds unless their name has another unit.
"""

from __future__ import annotations

from decimal import Decimal

SECOND = 1_000_000_000
DAY = 86_400 * SECOND


def date_text(days: int) -> str:
    """Return the date `days` after 1970-01-01; years outside 0 to 9999 have a sign, as ISO 8601 requires.

    The algorithm is civil_from_days of Howard Hinnant's "chrono-compatible low-level date algorithms".
    """
    era, of_era = divmod(days + 719_468, 146_097)
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    shifted = (5 * of_year + 2) // 153
    day = of_year - (153 * shifted + 2) // 5 + 1
    month = shifted + 3 if shifted < 10 else shifted - 9
    year += era * 400 + (month <= 2)
    sign = "-" if year < 0 else "+" if year > 9999 else ""
    return f"{sign}{abs(year):04d}-{month:02d}-{day:02d}"


def time_text(nanos: int) -> str:
    """Return a time of day, with no, six or nine fractional digits."""
    if nanos < 0:
        return f"-{time_text(-nanos)}"
    seconds, fraction = divmod(nanos, SECOND)
    digits = f"{fraction:09d}" if fraction % 1000 else f"{fraction // 1000:06d}"
    text = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{text}.{digits}" if fraction else text


def timestamp_text(nanos: int, utc: bool) -> str:
    """Return the time `nanos` after 1970-01-01T00:00:00."""
    days, rest = divmod(nanos, DAY)
    return f"{date_text(days)}T{time_text(rest)}{'+00:00' if utc else ''}"


def duration_text(nanos: int) -> str:
    """Return a duration as `PT1.5S`, `P1DT2H` or `-PT30M`; a day has 24 hours."""
    days, rest = divmod(abs(nanos), DAY)
    return ("-" if nanos < 0 else "") + interval_text(0, days, rest)


def interval_text(months: int, days: int, nanos: int) -> str:
    """Return a calendar interval whose parts each have their own sign: `P1Y2M3DT4H`, `P-1MT-0.5S`."""
    sign = -1 if nanos < 0 else 1
    seconds, fraction = divmod(abs(nanos), SECOND)
    years, months = (months // 12, months % 12) if months >= 0 else (-(-months // 12), -(-months % 12))
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    seconds_text = f"{seconds}.{fraction:09d}".rstrip("0") if fraction else str(seconds)
    before = "".join(f"{part}{unit}" for part, unit in ((years, "Y"), (months, "M"), (days, "D")) if part)
    after = "".join(f"{sign * part}{unit}" for part, unit in ((hours, "H"), (minutes, "M")) if part)
    if seconds or fraction:
        after += f"{'-' if sign < 0 else ''}{seconds_text}S"
    return f"P{before}{'T' if after else ''}{after}" if before or after else "PT0S"


def decimal_text(value: Decimal) -> str:
    """Return all digits of a decimal number, without an exponent."""
    return format(value, "f")
