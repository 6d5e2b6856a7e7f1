"""Plans: files, periods, and the grant of a period."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from metering.plans import included_minutes
from schemas.commands import CommandKind
from schemas.decode import decode_command
from schemas.plans import Period, Plan, load_plans
from schemas.settings import SettingsError


def ms(*parts: int) -> int:
    return round(datetime(*parts, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        ("day", (2026, 2, 28, 23, 59, 59), (2026, 2, 28), (2026, 3, 1)),
        ("week", (2026, 3, 1, 12), (2026, 2, 23), (2026, 3, 2)),
        ("week", (2026, 3, 2), (2026, 3, 2), (2026, 3, 9)),
        ("month", (2026, 12, 31, 23), (2026, 12, 1), (2027, 1, 1)),
        ("month", (2028, 2, 29), (2028, 2, 1), (2028, 3, 1)),
    ],
)
def test_periods_are_those_of_the_calendar(period: str, now: tuple, start: tuple, end: tuple) -> None:
    """In UTC; an instant at the start belongs to it."""
    assert Period(period).around(ms(*now)) == (ms(*start), ms(*end))


def test_a_plan_file(tmp_path: Path) -> None:
    """As JSON and as TOML; minutes are exact."""
    plan = {"name": "basic", "included_minutes": "100.5", "period": "month", "priority": 7}
    (tmp_path / "plans.json").write_text(json.dumps({"plans": [plan]}))
    (tmp_path / "plans.toml").write_text(
        '[[plans]]\nname = "basic"\nincluded_minutes = "100.5"\nperiod = "month"\npriority = 7\n'
    )
    for name in ("plans.json", "plans.toml"):
        found = load_plans(tmp_path / name)
        assert found == {"basic": Plan.model_validate(plan)}
        assert found["basic"].amount_us == 6_030_000_000
    assert load_plans(None) == {}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"included_minutes": "0"}, "plans.0.included_minutes"),
        ({"included_minutes": "0.00000001"}, "whole number of microseconds"),
        ({"period": "year"}, "plans.0.period"),
        ({"name": "a b"}, "plans.0.name"),
        ({"price": 3}, "plans.0.price"),
    ],
)
def test_a_wrong_plan_is_one_clear_line(tmp_path: Path, plan: dict, why: str) -> None:
    """With the file and the field."""
    good = {"name": "basic", "included_minutes": "100", "period": "month"}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"plans": [good | plan]}))
    with pytest.raises(SettingsError, match=why) as caught:
        load_plans(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_plans_have_names_of_their_own(tmp_path: Path) -> None:
    """Two of one name are refused; so is what is no file of plans at all."""
    good = {"name": "basic", "included_minutes": "100", "period": "month"}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"plans": [good, good]}))
    with pytest.raises(SettingsError, match="same name"):
        load_plans(file)
    file.write_text("{")
    with pytest.raises(SettingsError, match=r"plans\.json"):
        load_plans(file)


def test_the_grant_of_a_period_is_one_command_whenever_it_is_issued() -> None:
    """Settlement takes it; it pays for the windows of the period, and the next period has another one."""
    plan = Plan.model_validate({"name": "basic", "included_minutes": "100", "period": "day", "priority": 3})
    start, first = included_minutes(plan, "u" * 128, ms(2026, 3, 1, 1))
    assert (start, first) == included_minutes(plan, "u" * 128, ms(2026, 3, 1, 23))
    command = decode_command(first.model_dump_json().encode())
    assert (command.kind, command.amount_us) == (CommandKind.GRANT, 6_000_000_000)
    assert command.grant == (3, ms(2026, 3, 1), ms(2026, 3, 2))
    _, other = included_minutes(plan, "u" * 128, ms(2026, 3, 2))
    assert other.data.request_id != first.data.request_id
    assert included_minutes(plan, "u-2", ms(2026, 3, 1))[1].data.request_id != first.data.request_id
