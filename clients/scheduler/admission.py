"""What a scheduler asks and what it is told. Amounts are service microseconds (us), 60 000 000 a minute."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

US_PER_MINUTE = 60_000_000

MAX_HOLD_US = 1_000_000_000_000
"""The most that one hold may be: 16 666 minutes. With at most 4096 holds an account, every sum stays exact."""

MAX_LASTS_MS = 86_400_000
"""A hold lasts at most a day; admit the session again before it ends."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Reason(StrEnum):
    """Why an admission or a release came out as it did."""

    OK = "OK"
    """Redis decided: admitted, or released."""
    LAST_KNOWN = "LAST_KNOWN"
    """Admitted while Redis is away, from the balance that it told last."""
    AT_FLOOR = "AT_FLOOR"
    """Refused: what the account has, less what is held, is not above its floor."""
    TOO_MANY_HOLDS = "TOO_MANY_HOLDS"
    """Refused: the account has 4096 sessions with holds."""
    ALLOWANCE_SPENT = "ALLOWANCE_SPENT"
    """Refused while Redis is away: what may be admitted without it is used up."""
    NOT_READY = "NOT_READY"
    """Refused: Redis is empty, is being rebuilt, or lost what it had already told."""
    AWAY = "AWAY"
    """Refused: Redis cannot be asked. Of a release: it could not be told."""
    NO_ACCESS = "NO_ACCESS"
    """Refused: Redis does not let this client in. No waiting heals that."""
    NO_HOLD = "NO_HOLD"
    """Released nothing: there was no hold, or it had expired."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What a session may use before it is asked about again.

    `amount_us` counts against the balance for `lasts_ms`, or until the session is released. Raises ValueError.
    """

    amount_us: int
    lasts_ms: int

    def __post_init__(self) -> None:
        _check("amount_us", self.amount_us, 0, MAX_HOLD_US)
        _check("lasts_ms", self.lasts_ms, 1, MAX_LASTS_MS)

    @classmethod
    def of_minutes(cls, minutes: int, *, lasts_s: int) -> Hold:
        """A hold of whole balance minutes."""
        return cls(minutes * US_PER_MINUTE, lasts_s * 1_000)


def _check(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: it is an integer from {least} to {most}")


def check_id(name: str, value: object) -> str:
    """The id of a user or a session, as events may carry it. Raises ValueError."""
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise ValueError(f"{name}={value!r}: it is 1 to 128 characters of A-Z a-z 0-9 . _ : -")
    return value


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to `admit`; true when the session may run."""

    user: str
    session: str
    admitted: bool
    reason: Reason
    balance_us: int | None = None
    """None when nothing is known; the last known one when `degraded`. So are the two below."""
    held_us: int | None = None
    """The sum of the account's holds, this one included. When degraded, also what was admitted meanwhile."""
    floor_us: int | None = None
    expires_at_ms: int | None = None
    """Until when the session is admitted, in Unix ms, by the clock of Redis; when degraded, by this machine's."""
    degraded: bool = False
    """Redis was not asked, or could not answer."""
    detail: str = ""
    """What was wrong, for a log."""

    def __bool__(self) -> bool:
        return self.admitted


@dataclass(frozen=True, slots=True)
class Release:
    """The answer to `release`; true when the session surely has no hold any more."""

    user: str
    session: str
    released: bool
    reason: Reason
    held_us: int | None = None
    """What is still held for the account; None when Redis could not be told."""
    detail: str = ""

    def __bool__(self) -> bool:
        return self.released


@dataclass(frozen=True, slots=True)
class Swept:
    """The answer to `sweep`."""

    collected: int
    """Expired holds that were removed."""
    more: bool
    """Whether accounts with expired holds are left."""
