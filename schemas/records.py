"""Records that the pipeline writes: ledger lines, settlements, fence moves, dead letters.

Amounts are service microseconds (`_us`, signed 64-bit), instants integer milliseconds since the Unix epoch
(`_ms`). Empty strings stand for "none" where ClickHouse keeps a plain String.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class LedgerReason(StrEnum):
    """Why a balance moved."""

    CHARGE = "charge"
    CREDIT = "credit"
    REVENUE = "revenue"
    TOP_UP = "top_up"
    WRITE_OFF = "write_off"
    ADJUSTMENT = "adjustment"
    RESETTLE = "resettle"


class SettlementReason(StrEnum):
    """How a scope came to its end."""

    ENDED = "ended"
    TIMEOUT = "timeout"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LedgerLine(_Record):
    """One change of one balance. Lines of an account form a chain: each `balance_before_us` is the
    `balance_after_us` of the line whose `seq` is one less."""

    account: str = Field(description="user/<id>, node/<id>, platform/revenue, platform/top_ups, ...")
    seq: int = Field(ge=1, description="number of the line within its account, from 1, without gaps")
    change_us: int = Field(description="service microseconds; charges negative, credits positive")
    balance_before_us: int
    balance_after_us: int
    reason: LedgerReason
    epoch: int = Field(ge=1, description="which Redis wrote it; of equal (account, seq) the highest counts")
    request_id: str = Field(default="", description="the money command, or empty")
    cell_id: str = Field(default="", description="<scope>@<window_start_ms>, or empty for a money command")
    revision: int = Field(default=0, ge=0, description="of the cell's vector that this line posted")
    scope: str = ""
    session_id: str = ""
    room_id: str = ""
    rate_version: str = Field(
        default="", description="effective_from of the rates, comma-separated if several"
    )
    actor: str = Field(default="", description="who gave a money command")
    note: str = Field(default="", description="the money command's own words on why")
    posted_at_ms: int = Field(description="Redis' clock when the script ran")
    entry: int = Field(default=0, ge=0, description="number of the outbox entry that brought it")
    grants: dict[str, int] = Field(
        default_factory=dict, description="by how much (us) it changed what is left of grants, by their ids"
    )


class SettlementRecord(_Record):
    """A scope came to its end. Totals and shares are a view over the ledger; of several the highest
    revision counts."""

    scope: str
    session_id: str = ""
    room_id: str = ""
    reason: SettlementReason
    first_event_ms: int = Field(description="event time of the scope's first event still known")
    last_event_ms: int
    revision: int = Field(ge=1)
    epoch: int = Field(ge=1)
    posted_at_ms: int
    entry: int = Field(default=0, ge=0, description="number of the outbox entry that brought it")


class FenceMove(_Record):
    """The fence was raised: usage appended after `moved_at_ms` for a window before it is late."""

    frozen_before_ms: int
    epoch: int = Field(ge=1)
    moved_at_ms: int
    entry: int = Field(default=0, ge=0, description="number of the outbox entry that brought it")


class RequestRecord(_Record):
    """A money command that was carried out, whatever came of it: the first result, for ever."""

    request_id: str
    digest: str = Field(description="of the command's body: another body under the same id is a conflict")
    kind: str = Field(description="top_up, adjustment, write_off, grant")
    account: str
    amount_us: int = Field(description="what was moved; 0 when nothing was")
    balance_us: int = Field(description="of the account, afterwards")
    outcome: str = Field(description="APPLIED, OVER_LIMIT or INSUFFICIENT")
    actor: str
    note: str
    epoch: int = Field(ge=1)
    entry: int = Field(ge=0)
    posted_at_ms: int


class FloorRecord(_Record):
    """An account was given a floor of its own."""

    account: str
    floor_us: int
    epoch: int = Field(ge=1)
    entry: int = Field(ge=0)
    set_at_ms: int


class Threshold(StrEnum):
    """What a user's balance can fall past."""

    LOW = "low"
    """From 10 minutes or more to less."""
    ZERO = "zero"
    """From zero or more to less."""
    FLOOR = "floor"
    """From above the account's floor to it or below: no session is admitted any more."""


class Alert(_Record):
    """A user's balance fell past a threshold: once for each time that it does."""

    account: str
    threshold: Threshold
    balance_us: int = Field(description="afterwards")
    floor_us: int = Field(description="of the account, then")
    seq: int = Field(ge=0, description="the account's last ledger line then")
    epoch: int = Field(ge=1)
    entry: int = Field(ge=0, description="number of the outbox entry that brought it")
    at_ms: int = Field(description="Redis' clock, milliseconds since the Unix epoch")


class GrantRecord(_Record):
    """Minutes that were given for a while. What is left of them is the sum of what ledger lines say of the
    grant."""

    grant_id: str = Field(description="request id of the command that gave them")
    account: str
    priority: int
    from_ms: int
    expires_ms: int
    amount_us: int
    note: str = Field(description="the plan, or whatever else was said on why")
    epoch: int = Field(ge=1)
    entry: int = Field(ge=0)
    granted_at_ms: int


class OutboxPosition(_Record):
    """Every entry up to this one is stored whole."""

    epoch: int = Field(ge=1)
    entry: int = Field(ge=0)
    at_ms: int


class DeadLetter(_Record):
    """A message that was refused, with its original bytes. Identity: topic, log, partition, offset."""

    topic: str
    log: str = Field(default="", description="the topic's id: one made anew counts its offsets anew")
    partition: int = Field(ge=0, lt=2**31)
    offset: int = Field(ge=0, lt=2**63)
    reason: str
    detail: str
    key: bytes | None
    value: bytes | None = Field(description="the original bytes; None when the message had none")
    appended_at_ms: int = Field(description="broker's append time of the original message")
