"""The archive in ClickHouse: usage, lifecycle events and dead letters; and the journal of the outbox.

Laws:
- An insert returns once the server has stored the rows; nothing is buffered here between two calls.
- Every table replaces by identity, so the same rows again change nothing that FINAL shows. An insert that
  spans several partitions, or whose answer was lost, may have stored some of its rows: it is sent again.
- A server that is away is waited for, for ever. A server that says that the rows or the table are wrong is
  believed at once: `StoreRefused`.

Rows travel as columns in ClickHouse's Native format. Arrow is no faster, and its library imports pandas, where that
is installed, at the first array: seconds of CPU for a flow that must be back at once after a crash.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, DataError, OperationalError

from schemas.ports import StoreRefused
from schemas.records import (
    DeadLetter,
    FenceMove,
    FloorRecord,
    GrantRecord,
    LedgerLine,
    OutboxPosition,
    RequestRecord,
    SettlementRecord,
)
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow
from sinks.retrying import never_stop, retrying
from telemetry.quiet import ignore_retry

INSERT_SETTINGS: Mapping[str, object] = {
    # Stored when answered, not queued in the server's memory.
    "async_insert": 0,
    # The tables replace by identity. Block deduplication knows only recent blocks and would swallow a repair
    # that inserts again what was deleted. The second name is what servers since 26.2 obey.
    "insert_deduplicate": 0,
    "deduplicate_insert": "disable",
    # A server on its last bytes may answer that it has stored what it cannot read again; with room to spare it
    # refuses, and the flows wait.
    "min_free_disk_bytes_to_perform_insert": 64 << 20,
    # One batch may carry events of any number of months.
    "max_partitions_per_insert_block": 0,
}

HOPELESS_CODES = {
    16: "no such column in the table",
    20: "number of columns does not match",
    27: "cannot parse input",
    33: "cannot read all data",
    44: "illegal column",
    47: "unknown identifier",
    50: "unknown type",
    53: "type mismatch",
    60: "unknown table",
    62: "syntax error",
    70: "cannot convert type",
    73: "unknown format",
    81: "unknown database",
    115: "unknown setting",
    117: "incorrect data",
    131: "string too large",
    164: "read-only user",
    192: "unknown user",
    193: "wrong password",
    349: "NULL in a column that takes none",
    497: "access denied",
    516: "authentication failed",
}
"""ClickHouse error codes that the same request will meet again, in short words."""


class Column(NamedTuple):
    """One column of a batch, with the type as which it is sent. The server converts to what the table has."""

    type_name: str
    values: Sequence[object]


Columns = dict[str, Column]


def heals(error: Exception) -> bool:
    """Whether ClickHouse may take the same request later: it is away, busy, full or starting."""
    if isinstance(error, OSError):
        return True
    if type(error) not in (DatabaseError, OperationalError):
        return False
    assert isinstance(error, DatabaseError)
    return error.code not in HOPELESS_CODES


class _Inserter:
    """Sends columns to tables of one database and waits while the server is away."""

    def __init__(
        self,
        client: Client,
        database: str,
        *,
        stop: Callable[[], bool] = never_stop,
        on_retry: Callable[[Exception], None] = ignore_retry,
    ) -> None:
        self._client = client
        self._database = database
        self._stop = stop
        self._on_retry = on_retry

    def _insert(self, table: str, columns: Columns) -> None:
        try:
            retrying(
                lambda: self._client.insert(
                    table,
                    [column.values for column in columns.values()],
                    column_names=list(columns),
                    # Given, so that the client need not ask for them before each insert.
                    column_type_names=[column.type_name for column in columns.values()],
                    database=self._database,
                    column_oriented=True,
                    settings=dict(INSERT_SETTINGS),
                ),
                heals=heals,
                stop=self._stop,
                on_retry=self._on_retry,
            )
        except (DataError, OverflowError, struct.error) as error:
            raise StoreRefused(
                f"a row does not fit table {self._database}.{table}: {_first_line(error)}"
            ) from error
        except ClickHouseError as error:
            raise StoreRefused(_why_refused(self._database, table, error)) from error
        finally:
            # The client leaves what it sent in a reference cycle, a megabyte for a thousand lines; the collector is
            # set to come by seldom.
            gc.collect(0)


class ClickHouseUsageStore(_Inserter):
    """`schemas.ports.UsageStore` on ClickHouse."""

    def insert_usage(self, rows: Sequence[UsageRow]) -> None:
        """Store priced usage in `usage_events`."""
        if rows:
            self._insert("usage_events", usage_columns(rows))

    def insert_lifecycle(self, rows: Sequence[LifecycleRow]) -> None:
        """Store lifecycle events in `lifecycle_events`."""
        if rows:
            self._insert("lifecycle_events", lifecycle_columns(rows))

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Store refused messages in `dead_letters`."""
        if letters:
            self._insert("dead_letters", dead_letter_columns(letters))

    def insert_positions(self, positions: Sequence[StoredUpTo]) -> None:
        """Note in `usage_positions` how far the store is."""
        if positions:
            self._insert("usage_positions", position_columns(positions))


class ClickHouseJournal(_Inserter):
    """`schemas.ports.Journal` on ClickHouse.

    The outbox entry behind the rows is trimmed only after these calls have returned. A crash in between
    leaves rows that the next reader of the outbox inserts again, to no effect.
    """

    def insert_lines(self, lines: Sequence[LedgerLine]) -> None:
        """Store balance changes in `ledger`."""
        if lines:
            self._insert("ledger", ledger_columns(lines))

    def insert_settlements(self, settlements: Sequence[SettlementRecord]) -> None:
        """Store ends of scopes in `settlements`."""
        if settlements:
            self._insert("settlements", settlement_columns(settlements))

    def insert_fence_moves(self, moves: Sequence[FenceMove]) -> None:
        """Store moves of the fence in `fence_moves`."""
        if moves:
            self._insert("fence_moves", fence_move_columns(moves))

    def insert_requests(self, requests: Sequence[RequestRecord]) -> None:
        """Store results of money commands in `requests`."""
        if requests:
            self._insert("requests", request_columns(requests))

    def insert_floors(self, floors: Sequence[FloorRecord]) -> None:
        """Store floors in `floors`."""
        if floors:
            self._insert("floors", floor_columns(floors))

    def insert_grants(self, grants: Sequence[GrantRecord]) -> None:
        """Store grants in `grants`."""
        if grants:
            self._insert("grants", grant_columns(grants))

    def insert_position(self, position: OutboxPosition) -> None:
        """Note in `outbox_positions` how far the journal is."""
        self._insert(
            "outbox_positions",
            {
                "epoch": _uint64([position.epoch]),
                "entry": _uint64([position.entry]),
                "at_ms": _int64([position.at_ms]),
            },
        )


# Columns: a list per field is several times cheaper than an object per row and field.


def usage_columns(rows: Sequence[UsageRow]) -> Columns:
    """The columns of `usage_events`."""
    usages = [row.usage for row in rows]
    return {
        "scope": _text([usage.scope for usage in usages]),
        "source": _text([usage.source for usage in usages]),
        "id": _text([usage.id for usage in usages]),
        "partition": _uint32([row.partition for row in rows]),
        "offset": _uint64([row.offset for row in rows]),
        "time_ms": _int64([usage.time_ms for usage in usages]),
        "window_start_ms": _int64([row.window_start_ms for row in rows]),
        "session_id": _text([usage.session_id for usage in usages]),
        "room_id": _text([usage.room_id or "" for usage in usages]),
        "user_id": _text([usage.user_id for usage in usages]),
        "node_id": _text([usage.node_id for usage in usages]),
        "utterance_id": _text([usage.utterance_id for usage in usages]),
        "audio_ms": _nullable_uint32([usage.audio_ms for usage in usages]),
        "asr_time_ms": _uint32([usage.asr_time_ms for usage in usages]),
        "nmt_time_ms": _uint32([usage.nmt_time_ms for usage in usages]),
        "tts_time_ms": _uint32([usage.tts_time_ms for usage in usages]),
        "gpu_active_time_ms": _uint32([usage.gpu_active_time_ms for usage in usages]),
        "source_lang": _text([usage.source_lang or "" for usage in usages]),
        "target_lang": _text([usage.target_lang or "" for usage in usages]),
        "cost_us": _int64([row.cost_us for row in rows]),
        "credit_us": _int64([row.credit_us for row in rows]),
        "rate_version": _text([row.rate_version for row in rows]),
        "appended_at_ms": _int64([row.appended_at_ms for row in rows]),
    }


def lifecycle_columns(rows: Sequence[LifecycleRow]) -> Columns:
    """The columns of `lifecycle_events`."""
    events = [row.lifecycle for row in rows]
    return {
        "scope": _text([event.scope for event in events]),
        "source": _text([event.source for event in events]),
        "id": _text([event.id for event in events]),
        "partition": _uint32([row.partition for row in rows]),
        "offset": _uint64([row.offset for row in rows]),
        "time_ms": _int64([event.time_ms for event in events]),
        "kind": Column("Int8", [int(event.kind) for event in events]),
        "user_id": _text([event.user_id or "" for event in events]),
        "session_id": _text([event.session_id or "" for event in events]),
        "room_id": _text([event.room_id or "" for event in events]),
        "appended_at_ms": _int64([row.appended_at_ms for row in rows]),
    }


def ledger_columns(lines: Sequence[LedgerLine]) -> Columns:
    """The columns of `ledger`."""
    return {
        "account": _text([line.account for line in lines]),
        "seq": _int64([line.seq for line in lines]),
        "change_us": _int64([line.change_us for line in lines]),
        "balance_before_us": _int64([line.balance_before_us for line in lines]),
        "balance_after_us": _int64([line.balance_after_us for line in lines]),
        "reason": _text([line.reason for line in lines]),
        "epoch": _uint64([line.epoch for line in lines]),
        "request_id": _text([line.request_id for line in lines]),
        "cell_id": _text([line.cell_id for line in lines]),
        "revision": _int64([line.revision for line in lines]),
        "scope": _text([line.scope for line in lines]),
        "session_id": _text([line.session_id for line in lines]),
        "room_id": _text([line.room_id for line in lines]),
        "rate_version": _text([line.rate_version for line in lines]),
        "actor": _text([line.actor for line in lines]),
        "note": _text([line.note for line in lines]),
        "posted_at_ms": _int64([line.posted_at_ms for line in lines]),
        "entry": _uint64([line.entry for line in lines]),
        "grants": Column("Map(String, Int64)", [line.grants for line in lines]),
    }


def settlement_columns(settlements: Sequence[SettlementRecord]) -> Columns:
    """The columns of `settlements`."""
    return {
        "scope": _text([settlement.scope for settlement in settlements]),
        "session_id": _text([settlement.session_id for settlement in settlements]),
        "room_id": _text([settlement.room_id for settlement in settlements]),
        "reason": _text([settlement.reason for settlement in settlements]),
        "first_event_ms": _int64([settlement.first_event_ms for settlement in settlements]),
        "last_event_ms": _int64([settlement.last_event_ms for settlement in settlements]),
        "revision": _int64([settlement.revision for settlement in settlements]),
        "epoch": _uint64([settlement.epoch for settlement in settlements]),
        "posted_at_ms": _int64([settlement.posted_at_ms for settlement in settlements]),
        "entry": _uint64([settlement.entry for settlement in settlements]),
    }


def fence_move_columns(moves: Sequence[FenceMove]) -> Columns:
    """The columns of `fence_moves`."""
    return {
        "moved_at_ms": _int64([move.moved_at_ms for move in moves]),
        "frozen_before_ms": _int64([move.frozen_before_ms for move in moves]),
        "epoch": _uint64([move.epoch for move in moves]),
        "entry": _uint64([move.entry for move in moves]),
    }


def grant_columns(grants: Sequence[GrantRecord]) -> Columns:
    """The columns of `grants`."""
    return {
        "grant_id": _text([grant.grant_id for grant in grants]),
        "account": _text([grant.account for grant in grants]),
        "priority": _int64([grant.priority for grant in grants]),
        "from_ms": _int64([grant.from_ms for grant in grants]),
        "expires_ms": _int64([grant.expires_ms for grant in grants]),
        "amount_us": _int64([grant.amount_us for grant in grants]),
        "note": _text([grant.note for grant in grants]),
        "epoch": _uint64([grant.epoch for grant in grants]),
        "entry": _uint64([grant.entry for grant in grants]),
        "granted_at_ms": _int64([grant.granted_at_ms for grant in grants]),
    }


def request_columns(requests: Sequence[RequestRecord]) -> Columns:
    """The columns of `requests`."""
    return {
        "request_id": _text([request.request_id for request in requests]),
        "digest": _text([request.digest for request in requests]),
        "kind": _text([request.kind for request in requests]),
        "account": _text([request.account for request in requests]),
        "amount_us": _int64([request.amount_us for request in requests]),
        "balance_us": _int64([request.balance_us for request in requests]),
        "outcome": _text([request.outcome for request in requests]),
        "actor": _text([request.actor for request in requests]),
        "note": _text([request.note for request in requests]),
        "epoch": _uint64([request.epoch for request in requests]),
        "entry": _uint64([request.entry for request in requests]),
        "posted_at_ms": _int64([request.posted_at_ms for request in requests]),
    }


def floor_columns(floors: Sequence[FloorRecord]) -> Columns:
    """The columns of `floors`."""
    return {
        "account": _text([floor.account for floor in floors]),
        "floor_us": _int64([floor.floor_us for floor in floors]),
        "epoch": _uint64([floor.epoch for floor in floors]),
        "entry": _uint64([floor.entry for floor in floors]),
        "set_at_ms": _int64([floor.set_at_ms for floor in floors]),
    }


def position_columns(positions: Sequence[StoredUpTo]) -> Columns:
    """The columns of `usage_positions`."""
    return {
        "topic": _text([position.topic for position in positions]),
        "log": _text([position.log for position in positions]),
        "partition": _uint32([position.partition for position in positions]),
        "next_offset": _uint64([position.next_offset for position in positions]),
        "appended_at_ms": _int64([position.appended_at_ms for position in positions]),
    }


def dead_letter_columns(letters: Sequence[DeadLetter]) -> Columns:
    """The columns of `dead_letters`. The detail may quote what was refused, so it is made UTF-8 by force."""
    return {
        "topic": _text([letter.topic for letter in letters]),
        "log": _text([letter.log for letter in letters]),
        "partition": _uint32([letter.partition for letter in letters]),
        "offset": _uint64([letter.offset for letter in letters]),
        "reason": _text([letter.reason for letter in letters]),
        "detail": _bytes([letter.detail.encode("utf-8", "backslashreplace") for letter in letters]),
        "key": _nullable_bytes([letter.key for letter in letters]),
        "value": _nullable_bytes([letter.value for letter in letters]),
        "appended_at_ms": _int64([letter.appended_at_ms for letter in letters]),
    }


def _text(values: Sequence[str]) -> Column:
    return Column("String", values)


def _bytes(values: Sequence[bytes]) -> Column:
    return Column("String", values)


def _nullable_bytes(values: Sequence[bytes | None]) -> Column:
    return Column("Nullable(String)", values)


def _int64(values: Sequence[int]) -> Column:
    return Column("Int64", values)


def _uint32(values: Sequence[int]) -> Column:
    return Column("UInt32", values)


def _nullable_uint32(values: Sequence[int | None]) -> Column:
    return Column("Nullable(UInt32)", values)


def _uint64(values: Sequence[int]) -> Column:
    return Column("UInt64", values)


def _why_refused(database: str, table: str, error: ClickHouseError) -> str:
    code = getattr(error, "code", None)
    short = HOPELESS_CODES.get(code, "not a request that it understands") if code is not None else "refused"
    hint = "; run `metering migrate`" if code in (16, 47, 60, 81) else ""
    return f"ClickHouse refused rows for {database}.{table}: {short}{hint} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
