"""`metering reconcile` at scale: `python -m bench.reconcile_scale --rows 10000000`.

Makes usage rows, a ledger and balances that are consistent with each other, directly in ClickHouse and Redis, and
times one reconciliation of them (without the log, which is empty). Prints how long it took, and the peak memory of
the command and of the server during it. The rows are in sessions of ten windows of five utterances.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from clickhouse_connect.driver.client import Client
from confluent_kafka.admin import AdminClient

from app.clients import clickhouse_client, redis_client
from app.embedded import broker, clickhouse, process, valkey
from app.migrate import create_topics, run_migrations
from app.repair.reconcile import reconcile
from schemas import redis_keys
from schemas.settings import Settings, load_settings
from schemas.topics import EVENTS
from sources.kafka import describe_log

EVENTS_PER_CELL = 5
CELLS_PER_SESSION = 10
CELLS_PER_ENTRY = 20
NODES = 1_000
FIRST_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z."""
ROWS_AT_ONCE = 2_000_000

CELL = f"""
    toString(intDiv(cell, {CELLS_PER_SESSION})) AS session,
    {FIRST_MS} + (intDiv(cell, {CELLS_PER_SESSION}) % 1440 + cell % {CELLS_PER_SESSION}) * 60000 AS window_ms,
    concat('session/s-', session) AS scope,
    concat('n-', toString(cityHash64(cell) % {NODES})) AS node
"""


def main() -> None:
    """Make the books, then measure in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.reconcile_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="usage rows")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--directory", default=None, help="for the servers' data; by default a temporary one")
    options = parser.parse_args()
    if options.measure:
        measure()
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory, ExitStack() as stack:
        run(Path(directory), options.rows, stack)


def run(directory: Path, rows: int, stack: ExitStack) -> None:
    """Start the servers, fill them, and measure."""
    ports = [process.free_port() for _ in range(3)]
    services = (
        broker.service(ports[0]),
        valkey.service(directory / "redis", ports[1]),
        clickhouse.service(directory / "clickhouse", ports[2]),
    )
    pids = {}
    for service in services:
        child = process.start(service, directory / f"{service.name}.log")
        stack.callback(process.stop, child, 5.0)
        pids[service.name] = child.pid
    environment = {
        "METERING_KAFKA": f"127.0.0.1:{ports[0]}",
        "METERING_REDIS": f"redis://127.0.0.1:{ports[1]}/0",
        "METERING_CLICKHOUSE": f"http://127.0.0.1:{ports[2]}",
        "METERING_BROKER_APPEND_TIME": "false",
    }
    os.environ.update(environment)
    settings = load_settings()
    began_s = time.monotonic()
    lines, accounts = fill(settings, rows)
    print(f"{rows:,} usage rows, {lines:,} ledger lines, {accounts:,} accounts made in {_since(began_s)}")
    server = pids[services[2].name]
    # From here on the peak is counted anew.
    Path(f"/proc/{server}/clear_refs").write_text("5")
    print(f"ClickHouse before: {_peak_mb(server):,} MB, {os.cpu_count()} cores", flush=True)
    before_s = _cpu_s(server)
    subprocess.run([sys.executable, "-m", "bench.reconcile_scale", "--measure"], check=True)
    print(f"ClickHouse: {_cpu_s(server) - before_s:.1f} s of CPU; peak meanwhile {_peak_mb(server):,} MB")


def measure() -> None:
    """One reconciliation; its time and this process's peak memory."""
    settings = load_settings()
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    began_s = time.monotonic()
    report = reconcile(settings, say=print, read_log=False)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    used_s = time.process_time()
    print(
        f"{report.status} in {_since(began_s)}, {used_s:.1f} s of CPU in the command; its peak {peak_mb:,} MB, "
        f"{before_mb:,} MB before"
    )
    for each in report.comparisons:
        print(f"  {each.name}: {each.checked:,} checked, {each.differing:,} differ {each.unproven or ''}")
    for difference in [each for some in report.comparisons for each in some.first]:
        print(difference)


def fill(settings: Settings, rows: int) -> tuple[int, int]:
    """Make the books; returns how many ledger lines and accounts they have."""
    client = clickhouse_client(settings)
    run_migrations(client, settings.clickhouse_database)
    create_topics(settings.kafka, 1, settings.broker_append_time)
    log = describe_log(AdminClient({"bootstrap.servers": settings.kafka}), EVENTS)
    cells = rows // EVENTS_PER_CELL
    for first in range(0, rows, ROWS_AT_ONCE):
        _fill_usage(client, first, min(ROWS_AT_ONCE, rows - first))
    client.command(
        f"INSERT INTO lingua.usage_positions VALUES ('{EVENTS}', '{log.topic_id}', 0, {rows}, {FIRST_MS})"
    )
    for account, change, reason in (
        ("concat('user/u-', toString(intDiv(cell, 20)))", "-cost_us", "charge"),
        ("concat('node/', node)", "credit_us", "credit"),
        ("'platform/revenue'", "cost_us - credit_us", "revenue"),
    ):
        _fill_ledger(client, cells, account, change, reason)
    balances = _fill_redis(settings, client, cells, log.topic_id)
    [[lines]] = client.query("SELECT count() FROM lingua.ledger").result_rows
    return int(lines), balances


def _fill_usage(client: Client, first: int, count: int) -> None:
    client.command(
        f"""
        INSERT INTO lingua.usage_events (scope, source, id, partition, offset, time_ms, window_start_ms, session_id,
            room_id, user_id, node_id, utterance_id, asr_time_ms, nmt_time_ms, tts_time_ms, gpu_active_time_ms,
            source_lang, target_lang, cost_us, credit_us, rate_version, appended_at_ms)
        SELECT scope, concat('node/', node), toString(number), 0, number, window_ms + number % 60000, window_ms,
            concat('s-', session), '', concat('u-', toString(intDiv(cell, 20))), node, toString(number),
            100, 50, 60, 40 + number % 9 AS gpu, 'zh', 'en', 210000, gpu * 500, '1970-01-01T00:00:00.000Z',
            window_ms
        FROM (SELECT number, intDiv(number, {EVENTS_PER_CELL}) AS cell, {CELL} FROM numbers({first}, {count}))
        SETTINGS max_partitions_per_insert_block = 0
        """
    )


def _fill_ledger(client: Client, cells: int, account: str, change: str, reason: str) -> None:
    """One line of each cell for one kind of account, chained."""
    # The GPU times of a cell's five events: 40 + number % 9.
    gpu = " + ".join(f"(40 + (cell * {EVENTS_PER_CELL} + {event}) % 9)" for event in range(EVENTS_PER_CELL))
    client.command(
        f"""
        INSERT INTO lingua.ledger (account, seq, change_us, balance_before_us, balance_after_us, reason, epoch,
            cell_id, revision, scope, session_id, rate_version, posted_at_ms, entry)
        SELECT account, row_number() OVER by_account, change_us, after_us - change_us,
            sum(change_us) OVER by_account AS after_us, '{reason}', 1, concat(scope, '@', toString(window_ms)),
            (cell + 1) * {EVENTS_PER_CELL}, scope, concat('s-', session), '1970-01-01T00:00:00.000Z', window_ms,
            intDiv(cell, {CELLS_PER_ENTRY}) + 1
        FROM (
            SELECT cell, session, window_ms, scope, {account} AS account,
                toInt64(210000 * {EVENTS_PER_CELL}) AS cost_us, toInt64({gpu}) * 500 AS credit_us,
                toInt64({change}) AS change_us
            FROM (SELECT number AS cell, {CELL} FROM numbers({cells}))
        )
        WINDOW by_account AS (PARTITION BY account ORDER BY cell ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
        """
    )


def _fill_redis(settings: Settings, client: Client, cells: int, topic_id: str) -> int:
    live = redis_client(settings)
    rows = client.query(
        "SELECT account, argMax(balance_after_us, seq), max(seq) FROM lingua.ledger GROUP BY account"
    ).result_rows
    for first in range(0, len(rows), 10_000):
        pipeline = live.pipeline(transaction=False)
        for account, balance_us, seq in rows[first : first + 10_000]:
            pipeline.hset(redis_keys.balance(account), mapping={"balance_us": balance_us, "seq": seq})
        pipeline.execute()
    entries = (cells + CELLS_PER_ENTRY - 1) // CELLS_PER_ENTRY
    # Half of the windows of a day are frozen.
    live.mset(
        {
            redis_keys.EPOCH: 1,
            redis_keys.ENTRIES: entries,
            redis_keys.LEDGER_STORED: entries,
            redis_keys.FENCE: FIRST_MS + 720 * 60_000,
        }
    )
    live.hset(redis_keys.LOG, mapping={"topic_id": topic_id, "partition_count": 1, "generation": 0})
    return len(rows)


def _peak_mb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _since(began_s: float) -> str:
    return f"{time.monotonic() - began_s:.1f} s"


if __name__ == "__main__":
    main()
