"""Each analysts' view against an independent computation in Python on the same rows."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

from app import workload
from app.migrate import run_migrations
from metering.cells import cell_id, scope_ids, window_start_ms
from metering.pricing import cost_us, credit_us
from metering.settle import SettledLine, settle_lines
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.rate_card import load_rate_card
from schemas.records import FenceMove, LedgerLine, SettlementRecord
from schemas.rejections import Rejected
from schemas.rows import LifecycleRow, UsageRow
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from sinks.memory import MemoryUsageStore
from tests.support import archive
from tests.support.archive import (
    NOON_MS,
    ledger_chain,
    ledger_line,
    lifecycle_row,
    moved_row,
    settlement,
    usage_row,
)
from tests.support.services import Services

DATABASE = "views"
WORKLOAD = "workload"
DAY_MS = 86_400_000
MONTH_MS = 31 * DAY_MS

# A reader whose profile undoes what keeps FINAL whole, and changes what a join gives for no match.
HOSTILE_SETTINGS: dict[str, Any] = {
    "do_not_merge_across_partitions_select_final": 1,
    "defer_partition_pruning_after_final": 0,
    "join_use_nulls": 1,
}


@pytest.fixture(scope="module")
def migrated(services: Services) -> Client:
    """A client of a migrated database."""
    client = archive.connect(services.clickhouse, DATABASE)
    run_migrations(client, DATABASE)
    return client


@pytest.fixture
def client(migrated: Client) -> Client:
    """The same with empty tables."""
    archive.empty(migrated, DATABASE)
    return migrated


@pytest.fixture
def store(client: Client) -> ClickHouseUsageStore:
    """The usage store of the empty database."""
    return ClickHouseUsageStore(client, DATABASE)


@pytest.fixture
def journal(client: Client) -> ClickHouseJournal:
    """The journal of the empty database."""
    return ClickHouseJournal(client, DATABASE)


def rows_of(client: Client, query: str, **settings: object) -> list[dict[str, Any]]:
    """A query's rows by column name."""
    return list(client.query(query, settings=settings).named_results())


def rounded_minutes(amount_us: int) -> Decimal:
    """Minutes to nine digits, as the views show them."""
    return (Decimal(amount_us) / 60_000_000).quantize(Decimal("1e-9"))


# A realistic workload ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Books:
    """A workload as it lies in the archive, and what the pure core says about it."""

    client: Client
    counted: list[UsageRow]
    settled: list[SettledLine]
    lines: list[LedgerLine]
    endings: list[SettlementRecord]

    def charges(self, scope_prefix: str) -> dict[tuple[str, str, str], int]:
        """(scope, user, cell) -> what the user owes, where that is not nothing."""
        return {
            (
                line.cell_id.rpartition("@")[0],
                line.account.removeprefix("user/"),
                line.cell_id,
            ): -line.amount_us
            for line in self.settled
            if line.cell_id.startswith(scope_prefix) and line.account.startswith("user/") and line.amount_us
        }

    def settled_scopes(self) -> set[str]:
        """Scopes whose ending is newer than anything that was posted for them."""
        posted: dict[str, int] = defaultdict(int)
        for line in self.lines:
            posted[line.scope] = max(posted[line.scope], line.revision)
        return {ending.scope for ending in self.endings if ending.revision >= posted[ending.scope]}


@pytest.fixture(scope="module")
def books(services: Services) -> Books:
    """Sessions and rooms with repeats, disorder and junk, stored out of order, posted in two steps."""
    client = archive.connect(services.clickhouse, WORKLOAD)
    run_migrations(client, WORKLOAD)
    spec = workload.WorkloadSpec(
        seed=7,
        start_ms=NOON_MS + 11 * 3_600_000,
        events=3_000,
        minutes=120,
        transport=workload.TransportEffects(duplicates=0.1, disorder=0.1, junk=0.02),
    )
    messages = list(workload.generate(spec))
    card = load_rate_card(None)
    settled, _ = settle_lines(messages, card)
    chance = random.Random(7)
    counted = _store_usage(ClickHouseUsageStore(client, WORKLOAD), messages, chance)
    lines = _post(settled, chance)
    scopes = sorted({line.scope for line in lines})
    endings = [settlement(scope, revision=chance.choice([1, 2, 3])) for scope in scopes[::2]]
    journal = ClickHouseJournal(client, WORKLOAD)
    journal.insert_lines(chance.sample(lines, k=len(lines)))
    journal.insert_lines(lines[: len(lines) // 3])
    journal.insert_settlements(endings)
    return Books(client, counted, settled, lines, endings)


def _store_usage(store: ClickHouseUsageStore, messages: list[bytes], chance: random.Random) -> list[UsageRow]:
    """Store what is accepted, shuffled and partly twice; return what counts, by the in-memory twin."""
    card = load_rate_card(None)
    usage: list[UsageRow] = []
    lifecycle: list[LifecycleRow] = []
    for offset, message in enumerate(messages):
        try:
            event = decode_event(message)
        except Rejected:
            continue
        if not isinstance(event, Usage):
            lifecycle.append(LifecycleRow(event, 0, offset, NOON_MS))
            continue
        rates = card.version_at(event.time_ms)
        assert rates is not None
        window = window_start_ms(event.time_ms)
        cost, credit = cost_us(event, rates), credit_us(event, rates)
        usage.append(UsageRow(event, 0, offset, NOON_MS, window, cost, credit, rates.name))
    twin = MemoryUsageStore()
    for target in (store, twin):
        target.insert_usage(chance.sample(usage, k=len(usage)))
        target.insert_usage(usage[::3])
        target.insert_lifecycle(lifecycle)
    return twin.counted_usage()


def _post(settled: list[SettledLine], chance: random.Random) -> list[LedgerLine]:
    """Ledger lines for the vectors: some cells at once, others in a first guess and its correction."""
    lines: list[LedgerLine] = []
    balances: dict[str, int] = defaultdict(int)
    numbers: dict[str, int] = defaultdict(int)

    def post(line: SettledLine, change_us: int, revision: int) -> None:
        account, scope = line.account, line.cell_id.rpartition("@")[0]
        session_id, room_id = scope_ids(scope)
        numbers[account] += 1
        lines.append(
            ledger_line(
                account,
                numbers[account],
                change_us,
                balances[account],
                reason={"user": "charge", "node": "credit", "platform": "revenue"}[account.partition("/")[0]],
                cell_id=line.cell_id,
                revision=revision,
                scope=scope,
                session_id=session_id,
                room_id=room_id,
                rate_version=f"rates of revision {revision}",
            )
        )
        balances[account] += change_us

    for line in settled:
        guess_us = line.amount_us if chance.random() < 0.5 else chance.randrange(-(10**9), 10**9)
        if guess_us:
            post(line, guess_us, revision=1)
        if guess_us != line.amount_us:
            post(line, line.amount_us - guess_us, revision=2)
    return lines


def test_usage_shows_what_counts_once(books: Books) -> None:
    """The view has one row per identity that counts, with the amounts of its earliest occurrence."""
    expected = sorted(books.counted, key=lambda row: (row.usage.scope, row.usage.source, row.usage.id))
    assert archive.read_usage(books.client, "usage") == expected
    assert len(expected) > 1_000


def test_usage_per_minute_adds_up(books: Books) -> None:
    """Sums per minute, scope and session are those of the rows."""
    expected: dict[tuple[int, str, str, str], list[int]] = defaultdict(lambda: [0] * 7)
    for row in books.counted:
        usage = row.usage
        key = (row.window_start_ms, usage.scope, usage.room_id or "", usage.session_id)
        stages = (usage.asr_time_ms, usage.nmt_time_ms, usage.tts_time_ms, usage.gpu_active_time_ms)
        added = (1, *stages, row.cost_us, row.credit_us)
        expected[key] = [have + more for have, more in zip(expected[key], added, strict=True)]
    rows = books.client.query(
        """
        SELECT window_start_ms, scope, room_id, session_id, utterances, asr_time_ms, nmt_time_ms, tts_time_ms,
               gpu_active_time_ms, cost_us, credit_us
        FROM usage_per_minute
        """
    ).result_rows
    assert {row[:4]: list(row[4:]) for row in rows} == expected


def test_session_bills_are_the_settlement_of_sessions(books: Books) -> None:
    """One row per session and user: charge, total, minutes that cost something, whether it is over."""
    charges = books.charges("session/")
    by_user: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    totals: dict[str, int] = defaultdict(int)
    for (scope, user_id, cell), owed_us in charges.items():
        by_user[scope, user_id].append((int(cell.rpartition("@")[2]), owed_us))
        totals[scope] += owed_us
    settled_scopes = books.settled_scopes()
    expected = [
        {
            "session_id": scope.removeprefix("session/"),
            "user_id": user_id,
            "charged_us": sum(owed_us for _, owed_us in cells),
            "charged_minutes": rounded_minutes(sum(owed_us for _, owed_us in cells)),
            "session_total_us": totals[scope],
            "cells": len(cells),
            "first_window_start_ms": min(cells)[0],
            "last_window_start_ms": max(cells)[0],
            "settled": scope in settled_scopes,
            "scope": scope,
        }
        for (scope, user_id), cells in sorted(by_user.items())
    ]
    assert expected
    assert rows_of(books.client, "SELECT * FROM session_bills ORDER BY scope, user_id") == expected


def test_room_bills_are_the_settlement_of_rooms(books: Books) -> None:
    """One row per room and member, with the room's total beside the member's share."""
    by_user: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    totals: dict[str, int] = defaultdict(int)
    for (scope, user_id, cell), owed_us in books.charges("room/").items():
        by_user[scope, user_id].append((int(cell.rpartition("@")[2]), owed_us))
        totals[scope] += owed_us
    settled_scopes = books.settled_scopes()
    expected = [
        {
            "room_id": scope.removeprefix("room/"),
            "user_id": user_id,
            "share_us": sum(owed_us for _, owed_us in cells),
            "share_minutes": rounded_minutes(sum(owed_us for _, owed_us in cells)),
            "room_total_us": totals[scope],
            "cells": len(cells),
            "first_window_start_ms": min(cells)[0],
            "last_window_start_ms": max(cells)[0],
            "settled": scope in settled_scopes,
            "scope": scope,
        }
        for (scope, user_id), cells in sorted(by_user.items())
    ]
    assert any(row["settled"] for row in expected) and not all(row["settled"] for row in expected)
    assert rows_of(books.client, "SELECT * FROM room_bills ORDER BY scope, user_id") == expected


def test_room_bill_lines_are_the_shares_of_each_minute(books: Books) -> None:
    """One row per room, minute and member, with the minute's total and number of payers."""
    charges = books.charges("room/")
    totals: dict[str, int] = defaultdict(int)
    payers: dict[str, int] = defaultdict(int)
    for (_, _, cell), owed_us in charges.items():
        totals[cell] += owed_us
        payers[cell] += 1
    postings: dict[tuple[str, str], list[LedgerLine]] = defaultdict(list)
    for line in books.lines:
        postings[line.account, line.cell_id].append(line)
    expected = {
        (scope, user_id, cell): (
            owed_us,
            totals[cell],
            payers[cell],
            len(postings[f"user/{user_id}", cell]),
            postings[f"user/{user_id}", cell][-1].rate_version,
            int(cell.rpartition("@")[2]),
        )
        for (scope, user_id, cell), owed_us in charges.items()
    }
    rows = books.client.query(
        """
        SELECT scope, user_id, cell_id,
               share_us, cell_total_us, payers, postings, rate_version, window_start_ms
        FROM room_bill_lines
        """
    ).result_rows
    assert {row[:3]: row[3:] for row in rows} == expected
    assert len(rows) == len(expected)


def test_statements_are_whole_chains(books: Books) -> None:
    """A statement lists every line of an account in order, each starting where the one before ended."""
    rows = rows_of(books.client, "SELECT * FROM account_statements")
    shown = [(row["account"], row["seq"], row["change_us"], row["balance_after_us"]) for row in rows]
    expected = sorted(books.lines, key=lambda line: (line.account, line.seq))
    assert shown == [(line.account, line.seq, line.change_us, line.balance_after_us) for line in expected]
    for row, following in pairwise(rows):
        if row["account"] == following["account"]:
            assert following["balance_before_us"] == row["balance_after_us"]
    for row in rows:
        assert row["change_minutes"] == rounded_minutes(row["change_us"])
        assert row["balance_before_minutes"] == rounded_minutes(row["balance_before_us"])
        assert row["balance_after_minutes"] == rounded_minutes(row["balance_after_us"])


def test_user_statements_are_those_of_users(books: Books) -> None:
    """The view leaves out nodes and the platform and names the user."""
    rows = rows_of(books.client, "SELECT user_id, account, seq FROM user_statements")
    expected = sorted(
        (line.account.removeprefix("user/"), line.account, line.seq)
        for line in books.lines
        if line.account.startswith("user/")
    )
    assert [tuple(row.values()) for row in rows] == expected


def test_balances_are_the_sums_of_the_settlement(books: Books) -> None:
    """Each account stands where the pure core says, with no number missing, and all sum to zero."""
    expected: dict[str, int] = defaultdict(int)
    for settled in books.settled:
        expected[settled.account] += settled.amount_us
    last: dict[str, LedgerLine] = {}
    for line in books.lines:
        last[line.account] = line
    rows = rows_of(books.client, "SELECT * FROM balances")
    assert {row["account"]: row["balance_us"] for row in rows} == {
        account: expected[account] for account in last
    }
    assert sum(row["balance_us"] for row in rows) == 0
    for row in rows:
        newest = last[row["account"]]
        assert row["balance_us"] == row["changes_us"] == newest.balance_after_us
        assert row["lines"] == row["last_seq"] == newest.seq
        assert row["balance_minutes"] == rounded_minutes(row["balance_us"])
        assert row["last_epoch"] == 1


def test_node_earnings_are_credit_by_day(books: Books) -> None:
    """Per node and day: the credit of the ledger beside the credit, GPU time and utterances of the usage."""
    expected: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for settled in books.settled:
        if settled.account.startswith("node/"):
            start_ms = int(settled.cell_id.rpartition("@")[2])
            expected[settled.account.removeprefix("node/"), start_ms // DAY_MS][0] += settled.amount_us
    for row in books.counted:
        sums = expected[row.usage.node_id, row.window_start_ms // DAY_MS]
        sums[1] += row.credit_us
        sums[2] += row.usage.gpu_active_time_ms
        sums[3] += 1
    rows = rows_of(books.client, "SELECT * FROM node_earnings")
    shown = {
        (row["node_id"], row["day_start_ms"] // DAY_MS): [
            row["credit_us"],
            row["reported_credit_us"],
            row["gpu_active_time_ms"],
            row["utterances"],
        ]
        for row in rows
    }
    assert shown == expected
    assert len({row["day"] for row in rows}) == 2, "the workload runs past midnight"
    assert all(row["credit_us"] == row["reported_credit_us"] for row in rows)
    assert all(row["credit_minutes"] == rounded_minutes(row["credit_us"]) for row in rows)


def test_settlement_totals_sum_the_ledger(books: Books) -> None:
    """Each ended scope has what its users paid, its nodes earned and the platform kept."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    cells: dict[str, set[str]] = defaultdict(set)
    payers: dict[str, set[str]] = defaultdict(set)
    for line in books.settled:
        scope = line.cell_id.rpartition("@")[0]
        kind = line.account.partition("/")[0]
        sums[scope][kind] += line.amount_us
        cells[scope].add(line.cell_id)
        if kind == "user" and line.amount_us:
            payers[scope].add(line.account)
    settled_scopes = books.settled_scopes()
    expected = {
        ending.scope: (
            -sums[ending.scope]["user"],
            sums[ending.scope]["node"],
            sums[ending.scope]["platform"],
            len(payers[ending.scope]),
            len(cells[ending.scope]),
            ending.scope in settled_scopes,
            ending.revision,
        )
        for ending in books.endings
    }
    rows = books.client.query(
        """
        SELECT scope, charged_us, credited_us, platform_us, payers, cells, settled, revision
        FROM settlement_totals
        """
    ).result_rows
    assert {row[0]: row[1:] for row in rows} == expected
    assert all(charged == credited + platform for _, charged, credited, platform, *_ in rows)


VIEWS = (
    "usage",
    "usage_per_minute",
    "session_bills",
    "room_bills",
    "room_bill_lines",
    "account_statements",
    "user_statements",
    "balances",
    "node_earnings",
    "settlement_totals",
    "ledger_lines",
    "grants_left",
)


@pytest.mark.parametrize("view", VIEWS)
def test_views_do_not_depend_on_the_readers_settings(books: Books, view: str) -> None:
    """A profile that splits FINAL by partition, or makes joins give NULL, changes no answer."""
    query = f"SELECT * FROM {view} ORDER BY ALL"
    usual = books.client.query(query).result_rows
    assert usual == books.client.query(query, settings=HOSTILE_SETTINGS).result_rows
    assert usual == books.client.query(query, settings={"final": 1}).result_rows


def test_asking_for_one_member_leaves_the_totals_whole(books: Books) -> None:
    """A filter on the user does not reach below the sums over all members."""
    everything = rows_of(books.client, "SELECT * FROM room_bills ORDER BY scope, user_id")
    user_id = everything[0]["user_id"]
    asked = books.client.query(
        "SELECT * FROM room_bills WHERE user_id = {user:String} ORDER BY scope, user_id",
        parameters={"user": user_id},
    )
    assert list(asked.named_results()) == [row for row in everything if row["user_id"] == user_id]


def test_views_are_all_tested(client: Client) -> None:
    """Every view of the schema is in the list above."""
    rows = client.query(f"SELECT name FROM system.tables WHERE database = '{DATABASE}' AND engine = 'View'")
    assert {name for (name,) in rows.result_rows} == set(VIEWS)


def test_amounts_are_integers_and_nothing_is_a_float(client: Client) -> None:
    """Every `_us` column is Int64, every `_minutes` column a Decimal, and no column anywhere is a float."""
    columns = client.query(
        f"SELECT table, name, type, comment FROM system.columns WHERE database = '{DATABASE}'"
    ).result_rows
    assert columns
    for table, name, kind, _ in columns:
        assert "Float" not in kind, f"{table}.{name}"
        if name.endswith("_us"):
            assert kind == "Int64", f"{table}.{name}"
        if name.endswith("_minutes"):
            assert kind == "Decimal(38, 9)", f"{table}.{name}"
    units = [row for row in columns if row[0] in archive.TABLES and row[1].endswith(("_us", "_ms"))]
    assert units and all(comment for *_, comment in units)


# Edges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("appended_at_ms", "late"),
    [(NOON_MS + 99_999, False), (NOON_MS + 100_000, True), (NOON_MS + 100_001, True)],
)
def test_late_from_the_instant_of_the_move(
    client: Client, store: ClickHouseUsageStore, journal: ClickHouseJournal, appended_at_ms: int, late: bool
) -> None:
    """Usage is late when it was appended at or after the move that froze its window."""
    journal.insert_fence_moves(
        [FenceMove(frozen_before_ms=NOON_MS + 60_000, epoch=1, moved_at_ms=NOON_MS + 100_000)]
    )
    store.insert_usage([usage_row(time_ms=NOON_MS, appended_at_ms=appended_at_ms)])
    assert client.query("SELECT late FROM usage").result_rows == [(late,)]
    assert client.query("SELECT late_utterances FROM usage_per_minute").result_rows == [(int(late),)]


@pytest.mark.parametrize(
    ("frozen_before_ms", "late"), [(NOON_MS - 1, False), (NOON_MS, False), (NOON_MS + 1, True)]
)
def test_late_only_for_windows_that_start_before_the_fence(
    client: Client, store: ClickHouseUsageStore, journal: ClickHouseJournal, frozen_before_ms: int, late: bool
) -> None:
    """A window that starts exactly at the fence is not frozen."""
    journal.insert_fence_moves([FenceMove(frozen_before_ms=frozen_before_ms, epoch=1, moved_at_ms=NOON_MS)])
    store.insert_usage([usage_row(time_ms=NOON_MS + 59_999, appended_at_ms=NOON_MS + 70_000)])
    assert client.query("SELECT late FROM usage").result_rows == [(late,)]


def test_late_follows_the_definition_for_any_moves(
    client: Client, store: ClickHouseUsageStore, journal: ClickHouseJournal
) -> None:
    """For random moves, even ones that go back, an event is late if some earlier move froze its window."""
    chance = random.Random(3)
    moves = [
        FenceMove(
            frozen_before_ms=NOON_MS + 60_000 * chance.randrange(40),
            epoch=chance.choice([1, 2]),
            moved_at_ms=NOON_MS + 10_000 * chance.randrange(100),
        )
        for _ in range(60)
    ]
    rows = [
        usage_row(
            f"e-{n}",
            time_ms=NOON_MS + 60_000 * chance.randrange(40) + chance.choice([0, 59_999]),
            appended_at_ms=NOON_MS + 10_000 * chance.randrange(100) + chance.choice([-1, 0, 1]),
        )
        for n in range(500)
    ]
    journal.insert_fence_moves(moves)
    store.insert_usage(rows)
    expected = {
        row.usage.id: any(
            move.moved_at_ms <= row.appended_at_ms and move.frozen_before_ms > row.window_start_ms
            for move in moves
        )
        for row in rows
    }
    assert {row["id"]: row["late"] for row in rows_of(client, "SELECT id, late FROM usage")} == expected
    assert len(set(expected.values())) == 2


def test_nothing_is_late_without_a_fence(client: Client, store: ClickHouseUsageStore) -> None:
    """Usage of windows before 1970 is not late because of a fence that was never moved."""
    store.insert_usage([usage_row(time_ms=-62_135_596_800_000, appended_at_ms=NOON_MS)])
    assert client.query("SELECT late FROM usage").result_rows == [(False,)]
    assert client.query("SELECT late FROM usage", settings=HOSTILE_SETTINGS).result_rows == [(False,)]


@pytest.mark.parametrize("settings", [{}, HOSTILE_SETTINGS])
@pytest.mark.parametrize("filtered_from_ms", [NOON_MS - 3 * MONTH_MS, NOON_MS - MONTH_MS, NOON_MS])
def test_a_filter_on_time_does_not_revive_a_replaced_occurrence(
    client: Client, store: ClickHouseUsageStore, filtered_from_ms: int, settings: dict[str, Any]
) -> None:
    """A loser in another month stays lost when only its month is asked for."""
    counts = usage_row(time_ms=NOON_MS - 2 * MONTH_MS, offset=1)
    loser = usage_row(time_ms=NOON_MS, offset=2)
    store.insert_usage([counts])
    store.insert_usage([loser])
    shown = client.query(
        f"SELECT offset FROM usage WHERE time_ms >= {filtered_from_ms} AND time >= toDateTime64(0, 3, 'UTC')",
        settings=settings,
    )
    assert shown.result_rows == ([(1,)] if filtered_from_ms <= counts.usage.time_ms else [])


def test_usage_that_lost_its_identity_to_a_lifecycle_event_is_hidden(
    client: Client, store: ClickHouseUsageStore
) -> None:
    """The earlier of the two counts, judged by partition first and offset second; ties cannot be."""
    positions = [(0, 9), (0, 11), (1, 0)]
    rows = [usage_row(f"e-{n}", source="x", partition=0, offset=10) for n in range(3)]
    rows.append(moved_row(usage_row("e-3", source="x"), partition=1, offset=0))
    store.insert_usage(rows)
    store.insert_lifecycle(
        [
            lifecycle_row(f"e-{n}", source="x", partition=partition, offset=offset)
            for n, (partition, offset) in enumerate(positions)
        ]
        + [lifecycle_row("e-3", source="x", partition=0, offset=2**48 - 1)]
    )
    for settings in ({}, HOSTILE_SETTINGS):
        shown = client.query("SELECT id FROM usage ORDER BY id", settings=settings)
        assert shown.result_rows == [("e-1",), ("e-2",)]


def test_times_beyond_the_calendar_are_clamped_for_people_only(
    client: Client, store: ClickHouseUsageStore
) -> None:
    """The years 1 and 9999 show as 1900 and 2299, and the exact instants stay beside them."""
    first, last = -62_135_596_800_000, 253_402_300_799_999
    store.insert_usage(
        [usage_row("a", time_ms=first, appended_at_ms=0), usage_row("b", time_ms=last, appended_at_ms=0)]
    )
    rows = rows_of(client, "SELECT id, toString(time) AS time, time_ms FROM usage ORDER BY id")
    assert rows == [
        {"id": "a", "time": "1900-01-01 00:00:00.000", "time_ms": first},
        {"id": "b", "time": "2299-12-31 23:59:59.999", "time_ms": last},
    ]
    days = rows_of(
        client, "SELECT toString(day) AS day, day_start_ms FROM node_earnings ORDER BY day_start_ms"
    )
    assert days == [
        {"day": "1900-01-01", "day_start_ms": first},
        {"day": "2299-12-31", "day_start_ms": last // DAY_MS * DAY_MS},
    ]


def test_a_member_who_left_the_split_has_no_row(client: Client, journal: ClickHouseJournal) -> None:
    """A share that a correction took back to nothing is no share, and the totals do not count it."""
    fields = {"scope": "room/r-1", "room_id": "r-1", "cell_id": cell_id("room/r-1", NOON_MS)}
    journal.insert_lines(
        [*ledger_chain("user/u-1", [-50, -50], **fields), *ledger_chain("user/u-2", [-50, 50], **fields)]
    )
    rows = rows_of(client, "SELECT user_id, share_us, cell_total_us, payers, postings FROM room_bill_lines")
    assert rows == [{"user_id": "u-1", "share_us": 100, "cell_total_us": 100, "payers": 1, "postings": 2}]
    bills = rows_of(client, "SELECT user_id, share_us, room_total_us FROM room_bills")
    assert bills == [{"user_id": "u-1", "share_us": 100, "room_total_us": 100}]


def test_money_commands_are_on_no_bill(client: Client, journal: ClickHouseJournal) -> None:
    """Top-ups show on statements and balances only."""
    journal.insert_lines(
        [ledger_line("user/u-1", 1, 60_000_000, reason="top_up", request_id="q-1", note="gift")]
    )
    for view in ("session_bills", "room_bills", "room_bill_lines", "node_earnings", "settlement_totals"):
        assert client.query(f"SELECT count() FROM {view}").result_rows == [(0,)]
    [line] = rows_of(client, "SELECT reason, change_minutes, note FROM user_statements WHERE user_id = 'u-1'")
    assert line == {"reason": "top_up", "change_minutes": Decimal(1), "note": "gift"}
    [balance] = rows_of(client, "SELECT balance_us, balance_minutes FROM balances")
    assert balance == {"balance_us": 60_000_000, "balance_minutes": Decimal(1)}


@pytest.mark.parametrize(
    ("ended_at", "posted", "settled"),
    [
        (5, [("charge", 4)], True),
        (5, [("charge", 5)], True),
        (5, [("charge", 6)], False),
        (5, [("charge", 5), ("resettle", 9)], True),
        (None, [("charge", 5)], False),
    ],
)
@pytest.mark.parametrize(("scope", "view"), [("session/s-1", "session_bills"), ("room/r-1", "room_bills")])
def test_settled_until_a_later_revision_is_posted(
    client: Client,
    journal: ClickHouseJournal,
    *,
    scope: str,
    view: str,
    ended_at: int | None,
    posted: list[tuple[str, int]],
    settled: bool,
) -> None:
    """A scope is over from its ending until something newer is posted; repairs do not reopen it."""
    session_id, room_id = scope_ids(scope)
    cell = cell_id(scope, NOON_MS)
    journal.insert_lines(
        [
            ledger_line(
                "user/u-1",
                seq,
                -1,
                1 - seq,
                scope=scope,
                session_id=session_id,
                room_id=room_id,
                cell_id=cell,
                reason=reason,
                revision=revision,
            )
            for seq, (reason, revision) in enumerate(posted, start=1)
        ]
    )
    if ended_at is not None:
        journal.insert_settlements([settlement(scope, ended_at)])
    assert client.query(f"SELECT settled FROM {view}").result_rows == [(settled,)]


@pytest.mark.parametrize("amount_us", [0, 1, -1, 2, -30_000_001, 10**15 + 7, 2**63 - 1, -(2**63)])
def test_minutes_are_rounded_without_floats(
    client: Client, journal: ClickHouseJournal, amount_us: int
) -> None:
    """Minutes have nine exact digits over the whole range of amounts."""
    line = LedgerLine(
        account="user/u-1",
        seq=1,
        change_us=0,
        balance_before_us=amount_us,
        balance_after_us=amount_us,
        reason="adjustment",
        epoch=1,
        posted_at_ms=NOON_MS,
    )
    journal.insert_lines([line])
    [row] = rows_of(client, "SELECT balance_us, balance_minutes FROM balances")
    assert row == {"balance_us": amount_us, "balance_minutes": rounded_minutes(amount_us)}


def test_lines_that_a_rebuild_voided_are_in_no_view(client: Client, journal: ClickHouseJournal) -> None:
    """What an older epoch wrote after the entry that the rebuild went on from, however late it arrives."""
    cell = {"cell_id": f"session/s-1@{NOON_MS}", "scope": "session/s-1"}
    journal.insert_lines(
        [
            archive.ledger_line("user/u-1", 1, -70, entry=5, epoch=1, **cell),
            archive.ledger_line("user/u-1", 2, -1, before_us=-70, entry=6, epoch=1, **cell),
            archive.ledger_line("user/u-1", 3, -1, before_us=-71, entry=7, epoch=1, **cell),
        ]
    )
    client.command(f"INSERT INTO {DATABASE}.epochs VALUES (2, 5, 0)")
    journal.insert_lines([archive.ledger_line("user/u-1", 2, -5, before_us=-70, entry=6, epoch=2, **cell)])
    lines = rows_of(client, f"SELECT seq, change_us FROM {DATABASE}.ledger_lines ORDER BY seq")
    assert [(line["seq"], line["change_us"]) for line in lines] == [(1, -70), (2, -5)]
    [balance] = rows_of(client, f"SELECT balance_us, lines FROM {DATABASE}.balances")
    assert (balance["balance_us"], balance["lines"]) == (-75, 2)
    [bill] = rows_of(client, f"SELECT charged_us FROM {DATABASE}.session_bills")
    assert bill["charged_us"] == 75
    assert len(rows_of(client, f"SELECT seq FROM {DATABASE}.user_statements")) == 2
