"""Every ClickHouse query of the dashboards, run against the real schema with rows in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from math import isnan
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

import app.clients
from app.migrate import run_migrations
from metering.cells import cell_id
from schemas.records import DeadLetter, FenceMove, LedgerLine
from schemas.rejections import RejectReason
from schemas.settings import Settings
from schemas.topics import EVENTS
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from tests.support.archive import NOON_MS, ledger_chain, ledger_line, settlement, usage_row
from tests.support.dashboards import CLICKHOUSE_UID, PanelQuery, TimeRange, expand_macros, panel_queries
from tests.support.services import Services

DATABASE = "dashboards"
HOUR_MS = 3_600_000
AROUND_NOON = TimeRange(NOON_MS - HOUR_MS, NOON_MS + HOUR_MS, interval_s=60)
LONG_AGO = TimeRange(0, HOUR_MS, interval_s=60)
QUERIES = list(panel_queries(CLICKHOUSE_UID))
NAME = re.compile(r"\b(?:FROM|JOIN)\s+(\w+)")


@pytest.fixture(scope="module")
def client(services: Services) -> Iterator[Client]:
    """A client of a migrated database with a little of everything, all of it around noon."""
    made = app.clients.clickhouse_client(
        Settings(clickhouse=services.clickhouse, clickhouse_database=DATABASE)
    )
    run_migrations(made, DATABASE)
    _store_usage(ClickHouseUsageStore(made, DATABASE))
    _store_books(ClickHouseJournal(made, DATABASE))
    yield made
    made.command(f"DROP DATABASE {DATABASE}", use_database=False)
    made.close()


def _store_usage(store: ClickHouseUsageStore) -> None:
    """Usage in a room and in a session, one of it late, and a refused message that is no UTF-8."""
    store.insert_usage(
        [
            usage_row("room", time_ms=NOON_MS + 1_000),
            usage_row("session", scope="session/s-9", time_ms=NOON_MS + 61_000),
            usage_row("late", time_ms=NOON_MS + 2_000, appended_at_ms=NOON_MS + 50 * 60_000),
        ]
    )
    store.insert_dead_letters(
        [
            DeadLetter(
                topic=EVENTS,
                partition=0,
                offset=7,
                reason=RejectReason.NOT_JSON,
                detail="no JSON object",
                key=None,
                value=b"\xff\xfe{",
                appended_at_ms=NOON_MS,
            )
        ]
    )


def _store_books(journal: ClickHouseJournal) -> None:
    """One posted minute of each scope, one end of each, one move of the fence, and one broken chain."""
    lines: list[LedgerLine] = []
    for scope, user in (("room/r-1", "u-1"), ("session/s-9", "u-2")):
        kind, _, name = scope.partition("/")
        cell: dict[str, object] = {
            "scope": scope,
            "cell_id": cell_id(scope, NOON_MS),
            "room_id": name if kind == "room" else "",
            "session_id": name if kind == "session" else "",
            "revision": 1,
        }
        lines += ledger_chain(f"user/{user}", [-400_000], **cell)
        lines += ledger_chain(f"node/{user}", [175_000], **(cell | {"reason": "credit"}))
    lines.append(ledger_line("user/u-3", seq=2, change_us=-60_000_000, before_us=0))
    journal.insert_lines(lines)
    journal.insert_settlements([settlement("room/r-1", 1), settlement("session/s-9", 1)])
    journal.insert_fence_moves(
        [FenceMove(frozen_before_ms=NOON_MS + 60_000, epoch=1, moved_at_ms=NOON_MS + 45 * 60_000)]
    )


def run(client: Client, query: PanelQuery, time_range: TimeRange = AROUND_NOON) -> list[dict[str, Any]]:
    """The rows that the panel gets, by column name."""
    sql = expand_macros(query.target["rawSql"], time_range)
    return list(client.query(sql).named_results())


def query_named(name: str) -> PanelQuery:
    """A query by its panel's title."""
    [found] = [query for query in QUERIES if query.panel["title"] == name]
    return found


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_has_something_to_show(client: Client, query: PanelQuery) -> None:
    """Each query runs as it stands and finds the rows that are there."""
    assert run(client, query)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_bears_an_empty_range(client: Client, query: PanelQuery) -> None:
    """Each query also runs where there is nothing, and divides nothing by zero."""
    for row in run(client, query, LONG_AGO):
        assert not any(isinstance(value, float) and isnan(value) for value in row.values())


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_a_panel_shows_the_columns_that_it_formats(client: Client, query: PanelQuery) -> None:
    """A unit that is set for a column by name has its column."""
    [first, *_] = run(client, query)
    for override in query.panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in first


@pytest.mark.parametrize(
    "query",
    [query for query in QUERIES if query.panel["type"] == "timeseries"],
    ids=lambda query: query.name,
)
def test_a_time_series_is_times_and_numbers(client: Client, query: PanelQuery) -> None:
    """The first column is the time, the others are numbers, and the times ascend."""
    rows = run(client, query)
    assert query.target["queryType"] == "timeseries"
    times = [row.pop("time") for row in rows]
    assert times == sorted(times)
    assert all(isinstance(time, datetime) for time in times)
    assert all(isinstance(value, int | float) for row in rows for value in row.values())


def test_analysts_see_views_only(client: Client) -> None:
    """The views are the interface for analysts; only operators look into tables."""
    views = {
        row[0]
        for row in client.query(
            f"SELECT name FROM system.tables WHERE database = '{DATABASE}' AND engine = 'View'"
        ).result_rows
    }
    for query in QUERIES:
        read = set(NAME.findall(query.target["rawSql"]))
        assert read
        if query.dashboard == "analysts":
            assert read <= views
        else:
            assert read <= views | {"dead_letters", "fence_moves"}


def test_the_late_share_counts_the_late_one(client: Client) -> None:
    """One of three utterances was appended after the fence had passed its window."""
    assert run(client, query_named("Utterances")) == [{"utterances": 3}]
    assert run(client, query_named("Late usage")) == [{"late_share": pytest.approx(1 / 3)}]


def test_amounts_are_balance_minutes(client: Client) -> None:
    """400 000 us are a hundred and fiftieth of a minute."""
    [room] = run(client, query_named("Top rooms"))
    assert room["charged_min"] == pytest.approx(400_000 / 60_000_000)
    debts = run(client, query_named("Balances below zero"))
    assert [(debt["account"], debt["balance_min"]) for debt in debts] == [
        ("user/u-3", -1.0),
        ("user/u-1", pytest.approx(-400_000 / 60_000_000)),
        ("user/u-2", pytest.approx(-400_000 / 60_000_000)),
    ]


def test_only_the_broken_chain_is_shown(client: Client) -> None:
    """The account without its first line is named, the whole ones are not."""
    [broken] = run(client, query_named("Broken chains"))
    assert (broken["account"], broken["missing_lines"]) == ("user/u-3", 1)


def test_bytes_that_are_no_text_are_shown(client: Client) -> None:
    """A dead letter may hold anything; the panel shows what can be shown of it."""
    [letter] = run(client, query_named("Newest dead letters"))
    assert letter["beginning"].endswith("{")
