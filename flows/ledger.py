"""The ledger flow: the outbox in Redis becomes the ledger in ClickHouse.

    outbox -> store (ClickHouse) -> note how far, and trim (Redis)

It needs no Kafka and no recovery store. Order of effects: read from the head, insert, then note how far the
ledger is and trim what is stored and older than the retention. A crash before the insert reads the entries
again. A crash between insert and note inserts them again; the tables replace by identity. An entry is never
trimmed, nor counted as stored, before its rows are stored. A crash between two tables leaves entries of which
some rows are stored: how far the journal is whole goes into it last.
"""

from __future__ import annotations

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import Source
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from metering.outbox import OutboxEntry, parse_entry
from metering.ports import Outbox
from schemas.messages import OutboxMessage
from schemas.ports import Journal
from schemas.records import OutboxPosition
from telemetry import faults, metrics

FLOW = "ledger"


class JournalSink(DynamicSink[list[OutboxMessage]]):
    """Stores the entries of each batch, then lets the outbox forget what it may."""

    def __init__(self, journal: Journal, outbox: Outbox) -> None:
        self._journal = journal
        self._outbox = outbox

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _JournalPartition:
        """One a worker; only one of them gets anything, since the outbox has one reader."""
        return _JournalPartition(self._journal, self._outbox)


class _JournalPartition(StatelessSinkPartition[list[OutboxMessage]]):
    def __init__(self, journal: Journal, outbox: Outbox) -> None:
        self._journal = journal
        self._outbox = outbox

    def write_batch(self, items: list[list[OutboxMessage]]) -> None:
        """Blocks until everything is stored; then trims."""
        messages = [message for batch in items for message in batch]
        if not messages:
            return
        readable = [(message, entry) for message in messages if (entry := self._read(message)) is not None]
        entries = [entry for _, entry in readable]
        lines = [line for entry in entries for line in entry.lines]
        settlements = [record for entry in entries for record in entry.settlements]
        fence_moves = [move for entry in entries for move in entry.fence_moves]
        requests = [request for entry in entries for request in entry.requests]
        floors = [floor for entry in entries for floor in entry.floors]
        grants = [grant for entry in entries for grant in entry.grants]
        if lines:
            self._journal.insert_lines(lines)
        if settlements:
            self._journal.insert_settlements(settlements)
        if fence_moves:
            self._journal.insert_fence_moves(fence_moves)
        if requests:
            self._journal.insert_requests(requests)
        if floors:
            self._journal.insert_floors(floors)
        if grants:
            self._journal.insert_grants(grants)
        if entries:
            last_entry = entries[-1]
            self._journal.insert_position(
                OutboxPosition(epoch=last_entry.epoch, entry=last_entry.number, at_ms=last_entry.at_ms)
            )
        faults.reach(faults.AFTER_CLICKHOUSE_INSERT)
        metrics.LEDGER_LINES.inc(len(lines))
        if readable:
            last, entry = readable[-1]
            metrics.OUTBOX_ENTRIES.set(self._outbox.note_stored(last, entry.number))

    def _read(self, message: OutboxMessage) -> OutboxEntry | None:
        try:
            return parse_entry(message.fields)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            # Nobody but the scripts writes here. Whoever did: set it aside, whole, and let the rest go on.
            self._outbox.set_aside(message, f"{type(error).__name__}: {error}")
            metrics.UNREADABLE.inc()
            return None


def build_flow(outbox: Source[list[OutboxMessage]], journal: Journal, outbox_keeper: Outbox) -> Dataflow:
    """The flow."""
    flow = Dataflow(FLOW)
    op.output("journal", op.input("outbox", flow, outbox), JournalSink(journal, outbox_keeper))
    return flow
