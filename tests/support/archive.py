"""A migrated ClickHouse database for tests, rows to put into it, and how to read them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from clickhouse_connect.driver.client import Client

from app.clients import clickhouse_client
from app.embedded import clickhouse, process
from schemas.events import Lifecycle, LifecycleKind, Usage
from schemas.records import DeadLetter, FenceMove, LedgerLine, SettlementRecord
from schemas.rows import LifecycleRow, UsageRow
from schemas.settings import Settings
from tests.support.services import running_service

TABLES = (
    "usage_events",
    "lifecycle_events",
    "ledger",
    "settlements",
    "fence_moves",
    "dead_letters",
    "epochs",
    "requests",
    "floors",
    "usage_positions",
    "outbox_positions",
)
NOON_MS = 1_767_268_800_000
"""2026-01-01T12:00:00Z, the start of a window."""


@contextmanager
def clickhouse_server(directory: Path, port: int | None = None) -> Iterator[str]:
    """An embedded server of one's own, with its data in `directory`; yields its URL."""
    service = clickhouse.service(directory / "clickhouse", port or process.free_port())
    with running_service(service, directory / "clickhouse.log"):
        yield f"http://{process.LOOPBACK}:{service.port}"


def connect(url: str, database: str) -> Client:
    """A client as the program builds it."""
    return clickhouse_client(Settings(clickhouse=url, clickhouse_database=database))


def empty(client: Client, database: str) -> None:
    """Empty every table of the archive."""
    for table in TABLES:
        client.command(f"TRUNCATE TABLE `{database}`.{table}")


def usage_row(
    id: str = "e-1",
    *,
    scope: str = "room/r-1",
    source: str = "node/n-1",
    time_ms: int = NOON_MS + 1_000,
    partition: int = 0,
    offset: int = 0,
    appended_at_ms: int | None = None,
    user_id: str = "u-1",
    node_id: str = "n-1",
    audio_ms: int | None = 4_200,
    asr_time_ms: int = 120,
    source_lang: str | None = "zh",
    cost_us: int = 400_000,
    credit_us: int = 175_000,
) -> UsageRow:
    """Usage of one utterance with everything but what a test is about left at ordinary values."""
    kind, _, name = scope.partition("/")
    usage = Usage(
        scope=scope,
        source=source,
        id=id,
        time_ms=time_ms,
        session_id=name if kind == "session" else "s-1",
        room_id=name if kind == "room" else None,
        user_id=user_id,
        node_id=node_id,
        utterance_id=f"utterance-{id}",
        audio_ms=audio_ms,
        asr_time_ms=asr_time_ms,
        nmt_time_ms=80,
        tts_time_ms=200,
        gpu_active_time_ms=350,
        source_lang=source_lang,
        target_lang=source_lang and "en",
    )
    return UsageRow(
        usage=usage,
        partition=partition,
        offset=offset,
        appended_at_ms=time_ms + 500 if appended_at_ms is None else appended_at_ms,
        window_start_ms=time_ms - time_ms % 60_000,
        cost_us=cost_us,
        credit_us=credit_us,
        rate_version="1970-01-01T00:00:00.000Z",
    )


def lifecycle_row(
    id: str = "e-1",
    *,
    scope: str = "room/r-1",
    source: str = "scheduler/a",
    time_ms: int = NOON_MS,
    partition: int = 0,
    offset: int = 0,
    kind: LifecycleKind = LifecycleKind.JOINED,
) -> LifecycleRow:
    """A lifecycle event of a room."""
    room_id = scope.removeprefix("room/")
    user_id = None if kind is LifecycleKind.CLOSED else "u-1"
    event = Lifecycle(scope, source, id, time_ms, kind, user_id, session_id=None, room_id=room_id)
    return LifecycleRow(event, partition, offset, appended_at_ms=time_ms + 500)


def moved_row(row: UsageRow, **fields: object) -> UsageRow:
    """The same utterance as another occurrence, with fields of its row changed."""
    return msgspec.structs.replace(row, **fields)


def ledger_chain(account: str, changes_us: Iterable[int], **fields: object) -> list[LedgerLine]:
    """Lines of one account that follow from each other, from sequence number 1 and balance 0."""
    lines: list[LedgerLine] = []
    balance_us = 0
    for seq, change_us in enumerate(changes_us, start=1):
        lines.append(ledger_line(account, seq, change_us, balance_us, **fields))
        balance_us += change_us
    return lines


def ledger_line(account: str, seq: int, change_us: int, before_us: int = 0, **fields: object) -> LedgerLine:
    """One line with ordinary values besides."""
    values: dict[str, object] = {"reason": "charge", "epoch": 1, "posted_at_ms": NOON_MS + seq}
    return LedgerLine.model_validate(
        values
        | {
            "account": account,
            "seq": seq,
            "change_us": change_us,
            "balance_before_us": before_us,
            "balance_after_us": before_us + change_us,
        }
        | fields
    )


def settlement(scope: str, revision: int, **fields: object) -> SettlementRecord:
    """An end of a scope."""
    values: dict[str, object] = {
        "reason": "ended",
        "first_event_ms": NOON_MS,
        "last_event_ms": NOON_MS + 60_000,
        "epoch": 1,
        "posted_at_ms": NOON_MS + 61_000,
    }
    return SettlementRecord.model_validate(values | {"scope": scope, "revision": revision} | fields)


def read_usage(client: Client, table: str = "usage_events FINAL") -> list[UsageRow]:
    """The usage that FINAL, or a view, shows, by identity."""
    rows = client.query(
        f"""
        SELECT scope, source, id, time_ms, session_id, nullIf(room_id, ''), user_id, node_id, utterance_id,
               audio_ms, asr_time_ms, nmt_time_ms, tts_time_ms, gpu_active_time_ms, nullIf(source_lang, ''),
               nullIf(target_lang, ''), partition, offset, appended_at_ms, window_start_ms, cost_us,
               credit_us, rate_version
        FROM {table} ORDER BY scope, source, id
        """
    ).result_rows
    return [UsageRow(Usage(*row[:16]), *row[16:]) for row in rows]


def read_lifecycle(client: Client) -> list[LifecycleRow]:
    """The lifecycle events that FINAL shows, by identity."""
    rows = client.query(
        """
        SELECT scope, source, id, time_ms, kind, nullIf(user_id, ''), nullIf(session_id, ''),
               nullIf(room_id, ''), partition, offset, appended_at_ms
        FROM lifecycle_events FINAL ORDER BY scope, source, id
        """
    ).result_rows
    return [
        LifecycleRow(Lifecycle(scope, source, id, time_ms, LifecycleKind(kind), user, session, room), *place)
        for scope, source, id, time_ms, kind, user, session, room, *place in rows
    ]


def read_dead_letters(client: Client) -> list[DeadLetter]:
    """The dead letters that FINAL shows, with their bytes as they are."""
    names = list(DeadLetter.model_fields)
    rows = client.query(
        f"SELECT {', '.join(names)} FROM dead_letters FINAL ORDER BY topic, partition, offset",
        column_formats={"key": "bytes", "value": "bytes"},
    ).result_rows
    return [DeadLetter(**dict(zip(names, row, strict=True))) for row in rows]


def read_lines(client: Client) -> list[LedgerLine]:
    """The ledger lines that FINAL shows, by account, then seq."""
    names = list(LedgerLine.model_fields)
    rows = client.query(f"SELECT {', '.join(names)} FROM ledger FINAL ORDER BY account, seq").result_rows
    return [LedgerLine(**dict(zip(names, row, strict=True))) for row in rows]


def read_settlements(client: Client) -> list[SettlementRecord]:
    """The settlements that FINAL shows, by scope."""
    names = list(SettlementRecord.model_fields)
    rows = client.query(f"SELECT {', '.join(names)} FROM settlements FINAL ORDER BY scope").result_rows
    return [SettlementRecord(**dict(zip(names, row, strict=True))) for row in rows]


def read_fence_moves(client: Client) -> list[FenceMove]:
    """The moves that FINAL shows, in order."""
    rows = client.query(
        "SELECT frozen_before_ms, epoch, moved_at_ms FROM fence_moves FINAL ORDER BY ALL"
    ).result_rows
    moves = [FenceMove(frozen_before_ms=row[0], epoch=row[1], moved_at_ms=row[2]) for row in rows]
    return sorted(moves, key=lambda move: (move.moved_at_ms, move.frozen_before_ms, move.epoch))
