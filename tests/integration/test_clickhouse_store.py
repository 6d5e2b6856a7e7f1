"""The ClickHouse store where it differs from its twin: a server that is away, tables that are wrong, partitions."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from clickhouse_connect.driver.client import Client

from app.clients import ServerAway, clickhouse_client, is_loopback
from app.embedded import process
from app.migrate import run_migrations
from schemas.ports import Interrupted, StoreRefused
from schemas.settings import Settings
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from tests.support import archive
from tests.support.archive import NOON_MS, ledger_line, usage_row
from tests.support.services import Services

DATABASE = "store"


@pytest.fixture(scope="module")
def client(services: Services) -> Client:
    """A client of a migrated database."""
    client = archive.connect(services.clickhouse, DATABASE)
    run_migrations(client, DATABASE)
    return client


def test_rows_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    """An insert outlasts a restart of the server, is counted as retries, and stores its rows once."""
    retries: list[Exception] = []
    first_retry = threading.Event()

    def on_retry(error: Exception) -> None:
        retries.append(error)
        first_retry.set()

    port = process.free_port()
    with archive.clickhouse_server(tmp_path, port) as url:
        client = archive.connect(url, DATABASE)
        run_migrations(client, DATABASE)
        store = ClickHouseUsageStore(client, DATABASE, on_retry=on_retry)
        store.insert_usage([usage_row("before")])
    inserting = threading.Thread(target=store.insert_usage, args=([usage_row("during")],))
    inserting.start()
    assert first_retry.wait(10)
    assert inserting.is_alive()
    with archive.clickhouse_server(tmp_path, port):
        inserting.join(30)
        assert not inserting.is_alive()
        assert [row.usage.id for row in archive.read_usage(client)] == ["before", "during"]
    assert retries


def test_a_stop_ends_the_wait_for_a_server(tmp_path: Path) -> None:
    """A process that shall stop leaves with Interrupted instead of waiting for ever."""
    with archive.clickhouse_server(tmp_path) as url:
        client = archive.connect(url, DATABASE)
    stopping = threading.Event()
    store = ClickHouseUsageStore(
        client, DATABASE, stop=stopping.is_set, on_retry=lambda error: stopping.set()
    )
    with pytest.raises(Interrupted):
        store.insert_usage([usage_row()])


def test_a_missing_table_is_refused_at_once(client: Client) -> None:
    """Without migrations the error names the table and the remedy, after a single attempt."""
    retries: list[Exception] = []
    store = ClickHouseUsageStore(client, "nowhere", on_retry=retries.append)
    with pytest.raises(StoreRefused, match=r"nowhere\.usage_events: unknown .*metering migrate") as caught:
        store.insert_usage([usage_row()])
    assert "\n" not in str(caught.value)
    assert retries == []


def test_a_table_of_another_shape_is_refused_at_once(client: Client) -> None:
    """A table without our columns is an error of one line."""
    client.command("CREATE DATABASE IF NOT EXISTS misshapen")
    client.command("CREATE TABLE IF NOT EXISTS misshapen.ledger (x Int64) ENGINE = MergeTree ORDER BY x")
    journal = ClickHouseJournal(client, "misshapen")
    with pytest.raises(StoreRefused, match=r"misshapen\.ledger"):
        journal.insert_lines([ledger_line("user/u-1", 1, -5)])


def test_a_row_that_fits_no_column_is_refused_at_once(client: Client) -> None:
    """An amount beyond 64 bits is an error of one line, not a retry."""
    store = ClickHouseUsageStore(client, DATABASE)
    with pytest.raises(StoreRefused, match=r"a row does not fit table store\.usage_events: .*cost_us"):
        store.insert_usage([usage_row(cost_us=2**63)])


def test_absurd_times_open_no_more_partitions_than_the_clamp_allows(client: Client) -> None:
    """Times from the year 1 to 9999 lie in the months from 2020-01 to 2099-12."""
    archive.empty(client, DATABASE)
    century_ms = 36_525 * 86_400_000
    times = [-62_135_596_800_000 + n * century_ms for n in range(100) if n != 20]
    times += [1_577_836_799_999, 1_577_836_800_000, 4_102_444_799_999, 4_102_444_800_000]
    rows = [usage_row(f"e-{n}", time_ms=time_ms, appended_at_ms=0) for n, time_ms in enumerate(times)]
    ClickHouseUsageStore(client, DATABASE).insert_usage(rows)
    partitions = client.query(
        f"SELECT DISTINCT partition FROM system.parts "
        f"WHERE active AND database = '{DATABASE}' AND table = 'usage_events' ORDER BY partition"
    ).result_rows
    assert partitions == [("202001",), ("209912",)]
    assert len(archive.read_usage(client)) == len(times)


def test_merges_keep_what_final_showed(client: Client) -> None:
    """What a reader sees is the same before and after the engine has merged everything it can."""
    archive.empty(client, DATABASE)
    store = ClickHouseUsageStore(client, DATABASE)
    for offset in range(5):
        moved_ms = NOON_MS + offset % 2 * 40 * 86_400_000
        store.insert_usage([usage_row(f"e-{n}", offset=4 - offset, time_ms=moved_ms) for n in range(20)])
    before = archive.read_usage(client)
    assert {row.offset for row in before} == {0}
    client.command(f"OPTIMIZE TABLE {DATABASE}.usage_events FINAL")
    assert archive.read_usage(client) == before


def test_nobody_there_is_one_line() -> None:
    """A client for a server that is not there says which setting names it."""
    settings = Settings(clickhouse=f"http://127.0.0.1:{process.free_port()}")
    with pytest.raises(ServerAway, match=r"METERING_CLICKHOUSE=http://127\.0\.0\.1:") as caught:
        clickhouse_client(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "near"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("db", False),
    ],
)
def test_loopback_is_told_from_elsewhere(host: str, near: bool) -> None:
    """Only this machine's own addresses skip compression and proxies."""
    assert is_loopback(host) is near
