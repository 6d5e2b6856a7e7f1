"""Money commands: CloudEvents on `lingua.commands`, keyed by account.

Amounts are service microseconds (`_us`, signed 64-bit; one balance minute is 60 000 000). The same
`request_id` with the same body answers with the first result; with another body it is a conflict.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import msgspec
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from schemas.cloudevents import ID_CHARACTERS, CloudEvent, Id, Instant, Name256, Wire


class CommandKind(StrEnum):
    """What a money command does; the words are also the reasons of its ledger lines, but for a grant's, which is an
    adjustment."""

    TOP_UP = "top_up"
    ADJUSTMENT = "adjustment"
    WRITE_OFF = "write_off"
    GRANT = "grant"


class GrantTerms(NamedTuple):
    """When a grant is spent, and until when; instants are milliseconds since the Unix epoch."""

    priority: int
    from_ms: int
    expires_ms: int


class Command(msgspec.Struct, frozen=True, gc=False):
    """An accepted money command.

    `node_account` pays a write-off, whose `amount_us` is a maximum: the script clamps it to the debt of `account`
    and the credit of `node_account`. A top-up that names one is paid from the node's credit, all or nothing.
    """

    kind: CommandKind
    account: str
    amount_us: int
    request_id: str
    reason: str
    actor: str
    node_account: str | None
    source: str
    id: str
    time_ms: int
    grant: GrantTerms | None = None


US_PER_MINUTE = 60_000_000
"""Service microseconds of a balance minute."""

MAX_AMOUNT_US = 4_000_000_000_000_000
"""The largest amount of one command: 66 million minutes, and 2000 of them still fit into 64 bits."""

TOPPED_UP_TYPE = "lingua.account.topped_up.v1"
ADJUSTED_TYPE = "lingua.account.adjusted.v1"
WRITTEN_OFF_TYPE = "lingua.account.written_off.v1"
GRANTED_TYPE = "lingua.account.granted.v1"

Account = Annotated[str, Field(min_length=1, pattern=f"^(user|node)/{ID_CHARACTERS}$")]
UserAccount = Annotated[str, Field(min_length=1, pattern=f"^user/{ID_CHARACTERS}$")]
NodeAccount = Annotated[str, Field(min_length=1, pattern=f"^node/{ID_CHARACTERS}$")]
PositiveAmountUs = Annotated[int, Field(strict=True, gt=0, le=MAX_AMOUNT_US)]


def _not_zero(amount_us: int) -> int:
    if amount_us == 0:
        raise PydanticCustomError("zero_amount", "must not be 0")
    return amount_us


NonZeroAmountUs = Annotated[
    int,
    Field(strict=True, ge=-MAX_AMOUNT_US, le=MAX_AMOUNT_US, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]


class TopUpData(Wire):
    """Minutes given to an account: against `platform/top_ups`, or from a node's credit."""

    account: Account = Field(description="user/<user_id> or node/<node_id>")
    amount_us: PositiveAmountUs = Field(description="service microseconds")
    request_id: Id = Field(description="made by the client; one request is carried out once")
    reason: Name256 = Field(description="why, in the words of who gave it")
    actor: Name256 = Field(description="who gave it")
    paid_by: NodeAccount | None = Field(
        default=None, description="node/<node_id>, the one whose credit pays it, all or nothing"
    )


class AdjustmentData(Wire):
    """A correction of a balance in either direction, against `platform/adjustments`."""

    account: Account = Field(description="user/<user_id> or node/<node_id>")
    amount_us: NonZeroAmountUs = Field(description="service microseconds, positive in the account's favour")
    request_id: Id = Field(description="made by the client; one request is carried out once")
    reason: Name256 = Field(description="why, in the words of who gave it")
    actor: Name256 = Field(description="who gave it")


class WriteOffData(Wire):
    """A user's debt paid from a node's credit; the amount is a maximum."""

    account: UserAccount = Field(description="user/<user_id>, the one in debt")
    amount_us: PositiveAmountUs = Field(description="service microseconds, at most")
    request_id: Id = Field(description="made by the client; one request is carried out once")
    reason: Name256 = Field(description="why, in the words of who gave it")
    actor: Name256 = Field(description="who gave it")
    node_account: NodeAccount = Field(description="node/<node_id>, the one whose credit pays")


class GrantData(Wire):
    """Minutes for a while, against `platform/adjustments`: spent before the rest of the balance, taken back
    when they expire. The request id is the grant's name."""

    account: UserAccount = Field(description="user/<user_id>")
    amount_us: PositiveAmountUs = Field(description="service microseconds")
    request_id: Id = Field(description="made by the client; one request is carried out once")
    reason: Name256 = Field(description="the plan, the points: why, in the words of who gave it")
    actor: Name256 = Field(description="who gave it")
    priority: int = Field(strict=True, ge=0, le=1_000, description="the smallest is spent first")
    effective_from: Instant = Field(description="the first windows that it pays for start then; RFC 3339")
    expires_at: Instant = Field(description="the windows that it pays for start before; RFC 3339")


class Granted(CloudEvent):
    """A user was given minutes for a while."""

    type: Literal["lingua.account.granted.v1"]
    data: GrantData


class ToppedUp(CloudEvent):
    """An account was topped up."""

    type: Literal["lingua.account.topped_up.v1"]
    data: TopUpData


class Adjusted(CloudEvent):
    """A balance was corrected."""

    type: Literal["lingua.account.adjusted.v1"]
    data: AdjustmentData


class WrittenOff(CloudEvent):
    """A user's debt was written off against a node's credit."""

    type: Literal["lingua.account.written_off.v1"]
    data: WriteOffData


WireCommand = ToppedUp | Adjusted | WrittenOff | Granted

COMMAND_MODELS: dict[str, type[WireCommand]] = {
    TOPPED_UP_TYPE: ToppedUp,
    ADJUSTED_TYPE: Adjusted,
    WRITTEN_OFF_TYPE: WrittenOff,
    GRANTED_TYPE: Granted,
}
"""The model of each `type` that `lingua.commands` carries."""
