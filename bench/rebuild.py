"""`python -m bench.rebuild`: an empty Redis rebuilt from a ledger of many accounts; then again, when it is whole.

The ledger is made inside ClickHouse: for each account a top-up with its request and `--lines` charges, all of them
against the platform's accounts. Prints times, memory, and whether every account came back.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis
from clickhouse_connect.driver.client import Client

from app.clients import clickhouse_client
from bench.services import everything
from schemas.redis_keys import BALANCE_PREFIX
from schemas.settings import Settings

MIB = 1 << 20


def fill(client: Client, database: str, accounts: int, lines: int) -> None:
    """Accounts user/u-0000000 on, each with a top-up of 600 000 us and charges of 7 us."""
    about = (
        f"INSERT INTO {database}.ledger (account, seq, change_us, balance_before_us, balance_after_us, reason, "
        "epoch, request_id, cell_id, revision, scope, session_id, room_id, rate_version, actor, note, "
        "posted_at_ms, entry) SELECT "
    )
    user = "concat('user/u-', leftPad(toString(intDiv(number, {n})), 7, '0'))".replace("{n}", str(lines + 1))
    line = f"number % {lines + 1}"
    client.command(
        f"""{about} {user}, {line} + 1, if({line} = 0, 600000, -7), if({line} = 0, 0, 600000 - ({line} - 1) * 7),
        600000 - {line} * 7, if({line} = 0, 'top_up', 'charge'), 1,
        if({line} = 0, concat('q-', toString(intDiv(number, {lines + 1}))), ''),
        if({line} = 0, '', concat('session/s@', toString({line} * 60000))), 1,
        if({line} = 0, '', 'session/s'), '', '', '', '', '', 0, 0
        FROM numbers({accounts * (lines + 1)})"""
    )
    for account, change_us in (("platform/top_ups", -600_000), ("platform/revenue", 7 * lines)):
        total = accounts * change_us
        client.command(
            f"{about} '{account}', 1, {total}, 0, {total}, 'adjustment', 1, '', '', 0, '', '', '', '', '', '', 0, 0"
        )
    client.command(
        f"""INSERT INTO {database}.requests SELECT concat('q-', toString(number)), 'digest', 'top_up',
        concat('user/u-', leftPad(toString(number), 7, '0')), 600000, 600000, 'APPLIED', '', '', 1, 0, 0
        FROM numbers({accounts})"""
    )


def main() -> None:
    """Fill, empty, rebuild, and look."""
    parser = argparse.ArgumentParser(prog="python -m bench.rebuild", description=__doc__)
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--lines", type=int, default=5, help="charges an account")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, everything(Path(scratch), "tansu") as addresses:
        settings = Settings(**addresses)  # type: ignore[arg-type]
        client = clickhouse_client(settings)
        fill(client, settings.clickhouse_database, options.accounts, options.lines)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("METERING_")},
            **{f"METERING_{name.upper()}": value for name, value in addresses.items()},
            "METERING_BROKER_APPEND_TIME": "false",
            "METERING_STATE_DIR": str(Path(scratch) / "up"),
        }
        live = redis.Redis.from_url(addresses["redis"])
        for what in ("empty", "whole"):
            if what == "empty":
                live.flushall()
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "app", "rebuild-balances"],
                env=environment,
                capture_output=True,
                check=True,
            )
            seconds = time.monotonic() - started
            print(
                f"Redis {what}: rebuilt in {seconds:.1f} s, {options.accounts / seconds:,.0f} accounts a second"
            )
            print(f"  {done.stderr.decode().strip()}")
        found = sum(1 for _ in live.scan_iter(match=f"{BALANCE_PREFIX}*", count=10_000))
        wrong = 0
        for first in range(0, options.accounts, 10_000):
            pipeline = live.pipeline(transaction=False)
            for number in range(first, min(first + 10_000, options.accounts)):
                pipeline.hmget(f"balance:{{user/u-{number:07d}}}", "balance_us", "seq")
            expected = [str(600_000 - 7 * options.lines).encode(), str(options.lines + 1).encode()]
            wrong += sum(values != expected for values in pipeline.execute())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"  {found:,} balances in Redis, {wrong} wrong; Redis uses {live.info()['used_memory'] / MIB:,.0f} MiB"
        )
        print(f"  largest process of the run: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
