"""The alerts flow: users whose balance fell past a threshold, from the outbox to Kafka.

    outbox -> send alerts (Kafka) -> note how far (Redis)

The scripts that move balances say, in the outbox entry of the very move, who fell past what. So an alert is neither
missed nor made up, whatever is killed. Order of effects: the alerts of a batch are sent and confirmed, then it is
noted how far they are. A crash in between sends them again under the same ids. While this flow is away its entries
stay in the outbox, up to half of the bound; it needs neither ClickHouse nor a recovery store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import Source
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from metering.outbox import parse_entry
from schemas.alerts import balance_fell
from schemas.messages import OutboxMessage
from schemas.records import Alert
from telemetry import faults, metrics

FLOW = "alerts"

Send: TypeAlias = Callable[[Sequence[tuple[bytes, bytes]]], None]
"""Takes messages, as key and value, and returns when all of them are stored; waits while the broker is away."""

NOTE_EVERY_S = 5.0
"""Where nobody fell: each note costs Redis a write to its disk."""


class AlertSink(DynamicSink[list[OutboxMessage]]):
    """Sends the alerts of each batch, then notes the last entry's id."""

    def __init__(self, send: Send, note: Callable[[bytes], None]) -> None:
        self._send = send
        self._note = note

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _AlertPartition:
        """One a worker; only one of them gets anything, since the outbox is one partition."""
        return _AlertPartition(self._send, self._note)


class _AlertPartition(StatelessSinkPartition[list[OutboxMessage]]):
    def __init__(self, send: Send, note: Callable[[bytes], None]) -> None:
        self._send = send
        self._note = note
        self._noted_at = 0.0

    def write_batch(self, items: list[list[OutboxMessage]]) -> None:
        """Blocks until the broker has confirmed them all."""
        messages = [message for batch in items for message in batch]
        if not messages:
            return
        alerts = [alert for message in messages for alert in _alerts_of(message)]
        if alerts:
            self._send(
                [
                    (alert.account.encode(), balance_fell(alert).model_dump_json(exclude_none=True).encode())
                    for alert in alerts
                ]
            )
            faults.reach(faults.AFTER_ALERTS_SENT)
            for alert in alerts:
                metrics.ALERTS.labels(alert.threshold.value).inc()
        if alerts or time.monotonic() - self._noted_at > NOTE_EVERY_S:
            self._note(messages[-1].entry_id)
            self._noted_at = time.monotonic()


def _alerts_of(message: OutboxMessage) -> list[Alert]:
    if b"alerts" not in message.fields:
        return []
    try:
        return parse_entry(message.fields).alerts
    except (KeyError, ValueError, TypeError, IndexError):
        return []  # Foreign: the ledger flow sets it aside.


def build_flow(outbox: Source[list[OutboxMessage]], send: Send, note: Callable[[bytes], None]) -> Dataflow:
    """The flow."""
    flow = Dataflow(FLOW)
    op.output("alerts", op.input("outbox", flow, outbox), AlertSink(send, note))
    return flow
