"""Instants as text: RFC 3339 to and from integer milliseconds since the Unix epoch, by integers alone.

The one accepted form is `YYYY-MM-DDTHH:MM:SS[.digits](Z|+HH:MM|-HH:MM)` with upper-case `T` and `Z`, a date
that exists, hours 00..23, minutes and seconds 00..59. A second 60 is refused: Unix time has no number for it.
Any number of fraction digits is read and truncated to the millisecond, towards the past (before 1970 too).
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache

INSTANT_PATTERN = (
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})"
    r"(?:\.([0-9]+))?(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)
_INSTANT = re.compile(INSTANT_PATTERN)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_MS_PER_DAY = 86_400_000

FIRST_MS = -62_135_596_800_000
"""0001-01-01T00:00:00Z, the first instant that `format_rfc3339_ms` can write."""

LAST_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the last one."""


def parse_rfc3339_ms(text: str) -> int:
    """Milliseconds since the Unix epoch. Raises ValueError, with what is wrong, for anything else.

    An offset may carry the instant outside the years 1..9999; the number is right there too.
    """
    match = _INSTANT.fullmatch(text)
    if match is None:
        raise ValueError("is not YYYY-MM-DDTHH:MM:SS[.digits](Z|+HH:MM|-HH:MM)")
    year, month, day, hour, minute, second, fraction, sign, offset_hour, offset_minute = match.groups()
    try:
        days = date(int(year), int(month), int(day)).toordinal() - _EPOCH_DAY
    except ValueError:
        raise ValueError("is a date that does not exist") from None
    if hour > "23" or minute > "59" or second > "59":
        raise ValueError("is a time of day that does not exist")
    ms = days * _MS_PER_DAY + (int(hour) * 60 + int(minute)) * 60_000 + int(second) * 1000
    if fraction is not None:
        ms += int(fraction[:3].ljust(3, "0"))
    if sign is None:
        return ms
    if offset_hour > "23" or offset_minute > "59":
        raise ValueError("has an offset that does not exist")
    offset_ms = (int(offset_hour) * 60 + int(offset_minute)) * 60_000
    return ms - offset_ms if sign == "+" else ms + offset_ms


@lru_cache(maxsize=1024)
def format_rfc3339_ms(time_ms: int) -> str:
    """`YYYY-MM-DDTHH:MM:SS.mmmZ`. Raises ValueError outside FIRST_MS..LAST_MS."""
    if not FIRST_MS <= time_ms <= LAST_MS:
        raise ValueError(f"{time_ms} ms is outside the years 1..9999")
    days, ms = divmod(time_ms, _MS_PER_DAY)
    seconds, ms = divmod(ms, 1000)
    day = date.fromordinal(days + _EPOCH_DAY)
    return f"{day}T{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{ms:03}Z"
