"""The usage store flow: every accepted event, priced, and every dead letter become rows in ClickHouse.

    events -------> rows -------> store events (ClickHouse)
    dead letters -> parse ------> store dead letters (ClickHouse)

It needs no Redis and keeps no state but its place in the log. Order of effects: a batch is inserted, then the
epoch that read it is committed. A crash in between inserts the same rows again, in other batches; the tables
replace by identity, so nothing changes. Refused messages are skipped here: `settlement` sends them on.

How far each partition is stored goes into the store too, after the rows: a crash in between leaves a position
that is behind. Whoever reads the store can wait until it has what the log had at some moment.
"""

from __future__ import annotations

from collections.abc import Iterable

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import Source
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from flows.intake import accept_batch, letter_of
from metering.cells import window_start_ms
from metering.live import Located
from metering.pricing import cost_us, credit_us
from schemas.events import Lifecycle, Usage
from schemas.messages import RawMessage
from schemas.ports import UsageStore
from schemas.rate_card import RateCard
from schemas.records import DeadLetter
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow
from telemetry import faults, metrics

FLOW = "usage_store"

Row = UsageRow | LifecycleRow | DeadLetter | StoredUpTo


def row_of(located: Located, card: RateCard) -> UsageRow | LifecycleRow:
    """The row of an accepted event; usage is priced at the version in force at its time."""
    event, message = located.event, located.message
    if isinstance(event, Lifecycle):
        return LifecycleRow(event, message.partition, message.offset, message.appended_at_ms)
    rates = card.version_at(event.time_ms)
    assert rates is not None, "accepted usage has a rate"
    return UsageRow(
        event,
        message.partition,
        message.offset,
        message.appended_at_ms,
        window_start_ms(event.time_ms),
        cost_us(event, rates),
        credit_us(event, rates),
        rates.name,
    )


def rows(batches: list[list[RawMessage]], card: RateCard) -> Iterable[list[Row]]:
    """The rows of each batch of events, as one list, so that they go into one insert; its position comes last."""
    for batch in batches:
        accepted, _ = accept_batch(batch, card)
        usage = sum(type(located.event) is Usage for located in accepted)
        metrics.EVENTS.labels(FLOW, "usage").inc(usage)
        metrics.EVENTS.labels(FLOW, "lifecycle").inc(len(accepted) - usage)
        yield [*(row_of(located, card) for located in accepted), *_stored_up_to(batch)]


def letters(batches: list[list[RawMessage]]) -> Iterable[list[Row]]:
    """The dead letters of each batch, as one list; its position comes last."""
    for batch in batches:
        yield [*(letter_of(message) for message in batch), *_stored_up_to(batch)]


def _stored_up_to(batch: list[RawMessage]) -> list[StoredUpTo]:
    """A batch is of one partition, in the order of the log."""
    last = batch[-1:]
    return [
        StoredUpTo(message.topic, message.log, message.partition, message.offset + 1, message.appended_at_ms)
        for message in last
    ]


class StoreSink(DynamicSink[list[Row]]):
    """Inserts what it gets, at once and wholly: a buffer across two calls would be lost in a crash."""

    def __init__(self, store: UsageStore) -> None:
        self._store = store

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _StorePartition:
        """One for each worker; the store is shared."""
        return _StorePartition(self._store)


class _StorePartition(StatelessSinkPartition[list[Row]]):
    def __init__(self, store: UsageStore) -> None:
        self._store = store

    def write_batch(self, items: list[list[Row]]) -> None:
        """Blocks until everything is stored."""
        everything = [row for batch in items for row in batch]
        usage = [row for row in everything if isinstance(row, UsageRow)]
        lifecycle = [row for row in everything if isinstance(row, LifecycleRow)]
        dead = [row for row in everything if isinstance(row, DeadLetter)]
        positions = [row for row in everything if isinstance(row, StoredUpTo)]
        if usage:
            self._store.insert_usage(usage)
        if lifecycle:
            self._store.insert_lifecycle(lifecycle)
        if dead:
            self._store.insert_dead_letters(dead)
        faults.reach(faults.AFTER_USAGE_INSERT)
        if positions:
            self._store.insert_positions(positions)
        for table, stored in (
            ("usage_events", usage),
            ("lifecycle_events", lifecycle),
            ("dead_letters", dead),
        ):
            metrics.STORED_ROWS.labels(table).inc(len(stored))


def build_flow(
    events: Source[list[RawMessage]],
    dead_letters: Source[list[RawMessage]],
    store: UsageStore,
    card: RateCard,
) -> Dataflow:
    """The flow; both branches end in the same store."""
    flow = Dataflow(FLOW)
    event_rows = op.flat_map_batch("rows", op.input("events", flow, events), lambda some: rows(some, card))
    letter_rows = op.flat_map_batch("letters", op.input("dead_letters", flow, dead_letters), letters)
    op.output("store", op.merge("all_rows", event_rows, letter_rows), StoreSink(store))
    return flow
