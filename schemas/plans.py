"""Plans: minutes that are included in a period, by name.

A plan file is JSON or TOML: an object whose `plans` is a list. A plan holds `name`, `included_minutes` (a number of
minutes, to the microsecond), `period` (day, week or month, in UTC; weeks begin on Monday) and `priority` (0 to
1000; of several grants the one with the smallest is spent first).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from schemas.cloudevents import ID_CHARACTERS
from schemas.commands import MAX_AMOUNT_US, US_PER_MINUTE
from schemas.settings import SettingsError, explain_value_error, one_line


class Period(StrEnum):
    """For how long included minutes last."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def around(self, now_ms: int) -> tuple[int, int]:
        """Start and end (ms, UTC) of the period that this instant lies in."""
        day = datetime.fromtimestamp(now_ms / 1000, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if self is Period.DAY:
            start, end = day, day + timedelta(days=1)
        elif self is Period.WEEK:
            start = day - timedelta(days=day.weekday())
            end = start + timedelta(days=7)
        else:
            start = day.replace(day=1)
            end = (start + timedelta(days=32)).replace(day=1)
        return round(start.timestamp() * 1000), round(end.timestamp() * 1000)


def _whole_microseconds(minutes: Decimal) -> Decimal:
    amount_us = minutes * US_PER_MINUTE
    if not 0 < amount_us <= MAX_AMOUNT_US or amount_us != int(amount_us):
        raise ValueError("must be above 0 and a whole number of microseconds")
    return minutes


class Plan(BaseModel):
    """One plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=32, pattern=f"^{ID_CHARACTERS}$", description="letters, digits, . _ : -")
    included_minutes: Annotated[Decimal, AfterValidator(_whole_microseconds)] = Field(
        description="balance minutes that each period includes"
    )
    period: Period
    priority: int = Field(default=100, strict=True, ge=0, le=1_000, description="the smallest is spent first")

    @property
    def amount_us(self) -> int:
        """The included minutes in service microseconds."""
        return int(self.included_minutes * US_PER_MINUTE)


class PlanFile(BaseModel):
    """Plans as they stand in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plans: list[Plan]


def load_plans(path: Path | None) -> Mapping[str, Plan]:
    """The plans of a file by name; none without a file. Raises SettingsError, one line with the file and the
    field."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
        found = PlanFile.model_validate(document).plans
    except OSError as error:
        raise SettingsError(f"plans {path}: {error.strerror or error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SettingsError(f"plans {path}: {where}: {explain_value_error(problem)}") from None
    except ValueError as error:
        raise SettingsError(f"plans {path}: {one_line(str(error))}") from None
    plans = {plan.name: plan for plan in found}
    if len(plans) < len(found):
        raise SettingsError(f"plans {path}: two plans have the same name")
    return plans
