"""RFC 3339 instants to milliseconds, at every edge."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.decode import parse_rfc3339_ms
from schemas.rfc3339 import FIRST_MS, LAST_MS, format_rfc3339_ms


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.0019999Z", 1),
        ("1970-01-01T00:00:00.1Z", 100),
        ("1970-01-01T00:00:00.12+00:00", 120),
        ("1970-01-01T00:00:00-00:00", 0),
        ("1970-01-01T05:30:00+05:30", 0),
        ("1969-12-31T23:59:00-00:01", 0),
        ("1970-01-01T23:59:00+23:59", 0),
        ("1969-12-31T23:59:59.9999Z", -1),
        ("1969-12-31T23:59:59.0001Z", -1000),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000),
        ("2000-02-29T23:59:59.999999999999999999999999999999Z", 951_868_799_999),
        ("2026-01-01T00:00:00.123Z", 1_767_225_600_123),
        ("0001-01-01T00:00:00Z", FIRST_MS),
        ("0001-01-01T00:00:00+23:59", FIRST_MS - 86_340_000),
        ("9999-12-31T23:59:59.999Z", LAST_MS),
        ("9999-12-31T23:59:59.999-23:59", LAST_MS + 86_340_000),
        ("1970-01-01T00:00:00." + "0" * 60_000 + "Z", 0),
    ],
)
def test_instants(text: str, time_ms: int) -> None:
    """Fractions are truncated towards the past, offsets are subtracted, also beyond the calendar's ends."""
    assert parse_rfc3339_ms(text) == time_ms


@pytest.mark.parametrize(
    "text",
    [
        *("", "2026", "2026-01-01", "2026-01-01T00:00:00", "2026-01-01T00:00Z", "20260101T000000Z"),
        *("2026-01-01t00:00:00Z", "2026-01-01T00:00:00z", "2026-01-01 00:00:00Z", "2026-01-01T00:00:00 Z"),
        *("2026-01-01T00:00:00.Z", "2026-01-01T00:00:00,1Z", "2026-01-01T00:00:00+0000"),
        *("2026-01-01T00:00:00+00", "2026-01-01T00:00:00+24:00", "2026-01-01T00:00:00-00:60"),
        *("0000-01-01T00:00:00Z", "2026-00-01T00:00:00Z", "2026-13-01T00:00:00Z", "2026-01-00T00:00:00Z"),
        *("2026-02-29T00:00:00Z", "2100-02-29T00:00:00Z", "2026-04-31T00:00:00Z", "2026-01-32T00:00:00Z"),
        *("2026-01-01T24:00:00Z", "2026-01-01T00:60:00Z", "2026-01-01T00:00:61Z", "2016-12-31T23:59:60Z"),
        *(
            "2026-01-01T00:00:00Z\n",
            "\n2026-01-01T00:00:00Z",
            " 2026-01-01T00:00:00Z",
            "2026-01-01T00:00:00ZZ",
        ),
        *(
            "２026-01-01T00:00:00Z",
            "2026-01-01T00:00:00.١Z",
            "+2026-01-01T00:00:00Z",
            "12026-01-01T00:00:00Z",
        ),
        *("2026-1-01T00:00:00Z", "2026-01-01T00:00:00−01:00", "2026-01-01T-1:00:00Z", "2026-W01-1T00:00:00Z"),
    ],
)
def test_what_is_no_instant(text: str) -> None:
    """Other forms, and dates, times and offsets that do not exist (a leap second has no Unix time)."""
    with pytest.raises(ValueError, match=r"^(is|has) "):
        parse_rfc3339_ms(text)


@given(
    st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)),
    st.integers(-1439, 1439),
)
def test_agrees_with_the_standard_library(naive: datetime, offset_minutes: int) -> None:
    """Any instant with any offset is what `datetime` says, floored to the millisecond."""
    instant = naive.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    expected = (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert parse_rfc3339_ms(instant.isoformat()) == expected


@given(st.integers(FIRST_MS, LAST_MS))
def test_text_and_back(time_ms: int) -> None:
    """What is written is read as the same instant."""
    text = format_rfc3339_ms(time_ms)
    assert parse_rfc3339_ms(text) == time_ms
    assert len(text) == 24


@pytest.mark.parametrize("time_ms", [FIRST_MS - 1, LAST_MS + 1])
def test_years_that_cannot_be_written(time_ms: int) -> None:
    """Just outside the years 1..9999 there is no text."""
    with pytest.raises(ValueError, match=r"outside the years 1\.\.9999"):
        format_rfc3339_ms(time_ms)
