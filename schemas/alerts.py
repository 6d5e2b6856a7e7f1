"""Alerts: CloudEvents on `lingua.alerts`, keyed by account.

One for each time that a user's balance falls past a threshold. An alert may be delivered twice, with the same `id`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.cloudevents import CloudEvent, Wire
from schemas.records import Alert, Threshold
from schemas.rfc3339 import format_rfc3339_ms

BALANCE_FELL_TYPE = "lingua.account.balance_fell.v1"

SOURCE = "lingua/settlement"


class BalanceFellData(Wire):
    """Where the balance is now; amounts are service microseconds."""

    account: str = Field(description="user/<user_id>")
    threshold: Threshold = Field(
        description="low: below 10 minutes; zero: below zero; floor: at the floor or below, no session is admitted"
    )
    balance_us: int
    floor_us: int = Field(description="of the account")
    seq: int = Field(description="the account's last ledger line then")


class BalanceFell(CloudEvent):
    """A user's balance fell past a threshold."""

    type: Literal["lingua.account.balance_fell.v1"]
    data: BalanceFellData


ALERT_MODELS: dict[str, type[BalanceFell]] = {BALANCE_FELL_TYPE: BalanceFell}
"""The model of each `type` that `lingua.alerts` carries."""


def balance_fell(alert: Alert) -> BalanceFell:
    """The event of an alert. Its id depends on nothing but the outbox entry, so that a repeat is known for one."""
    return BalanceFell(
        specversion="1.0",
        id=f"{alert.epoch}-{alert.entry}-{alert.account}-{alert.threshold.value}",
        source=SOURCE,
        type="lingua.account.balance_fell.v1",
        time=format_rfc3339_ms(alert.at_ms),
        data=BalanceFellData(
            account=alert.account,
            threshold=alert.threshold,
            balance_us=alert.balance_us,
            floor_us=alert.floor_us,
            seq=alert.seq,
        ),
    )
