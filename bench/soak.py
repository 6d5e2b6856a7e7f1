"""Does memory stay bounded? An hour of event time at load, through everything that `metering up` runs, replayed
faster than time passes: `python -m bench.soak`.

What depends on the clock is sped up with it: the fence follows the event times at a fixed distance (this program
moves it, a window each event-minute; the keeper that moves it by the broker's clock is told to stay far behind),
and silence and the outbox' retention are that much shorter. Event times, and so windows and presence, are real.

Each event-minute is a row. Some columns should settle at a level: what is held for live windows and people who are
present. The others are what the work leaves behind, and grow as they should: accounts, request ids, dead letters,
the ledger. The summary compares the third quarter of the rows with the last: what has settled has a ratio near 1.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from statistics import mean

import redis
from clickhouse_connect import get_client
from clickhouse_connect.driver.client import Client
from confluent_kafka import Producer

from app.embedded.process import free_port
from app.money_commands import top_up_message
from app.workload import TransportEffects, WorkloadSpec, generate
from bench.services import everything
from metering.cells import WINDOW_MS, window_start_ms
from schemas import redis_keys
from schemas.decode import decode_event
from schemas.rejections import Rejected
from schemas.topics import COMMANDS, EVENTS
from sinks.balances import RedisBalances

MINUTES = 60
TAPER_MINUTES = 30
"""Made and never sent: towards its end a workload ends its sessions, and what shrinks for that proves nothing."""
DATABASE = "lingua"
GROWING = {"accounts", "requests", "ledger_lines", "dead_letters"}
"""Columns that have no level to settle at: they are what the work leaves behind."""


@dataclass(frozen=True)
class Row:
    """What is held at the end of one event-minute. Sizes are MiB."""

    minute: int
    events: int
    lag: int
    settlement_rss: float
    usage_store_rss: float
    ledger_rss: float
    store: float
    redis: float
    scopes: int
    cells: int
    outbox: int
    accounts: int
    requests: int
    ledger_lines: int
    dead_letters: int


@dataclass
class Probe:
    """Looks at the processes and servers from outside."""

    directory: Path
    live: redis.Redis
    archive: Client
    metrics_port: int

    def row(self, minute: int, events: int) -> Row:
        """Measure now."""
        store = self.directory / "up" / "recovery" / "settlement"
        page = self._metrics()
        return Row(
            minute=minute,
            events=events,
            lag=int(_total(page, "metering_consumer_lag_events")),
            settlement_rss=self._rss_mib("settlement"),
            usage_store_rss=self._rss_mib("usage_store"),
            ledger_rss=self._rss_mib("ledger"),
            store=sum(file.stat().st_size for file in store.glob("*")) / 2**20,
            redis=int(self.live.info("memory")["used_memory"]) / 2**20,
            scopes=int(_total(page, "metering_live_scopes")),
            cells=int(self.live.zcard(redis_keys.LIVE_CELLS)),
            outbox=int(self.live.xlen(redis_keys.LEDGER_STREAM)),
            accounts=self._keys(redis_keys.BALANCE_PREFIX),
            requests=self._keys(redis_keys.REQUEST_PREFIX),
            ledger_lines=self._count("ledger"),
            dead_letters=self._count("dead_letters"),
        )

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as page:
            text: str = page.read().decode()
            return text

    def _rss_mib(self, flow: str) -> float:
        # Every flow of this run has its log, and nobody else's, open as its output.
        log = self.directory / "up" / "logs" / f"{flow}.log"
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "fd" / "2").resolve() == log.resolve():
                    status = (process / "status").read_text()
                    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024
            except (OSError, IndexError):
                continue  # It is gone, or not ours to look at.
        return 0.0

    def _keys(self, prefix: str) -> int:
        return sum(1 for _ in self.live.scan_iter(match=f"{prefix}*", count=5_000))

    def _count(self, table: str) -> int:
        return int(self.archive.query(f"SELECT count() FROM {DATABASE}.{table}").result_rows[0][0])


def _total(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE))


def by_minute(spec: WorkloadSpec) -> Iterator[list[bytes]]:
    """The messages of each event-minute; what is no event goes with what came before it."""
    minute = 0

    def minute_of(line: bytes) -> int:
        nonlocal minute
        with suppress(Rejected):
            minute = max(minute, (decode_event(line).time_ms - spec.start_ms) // WINDOW_MS)
        return minute

    for _, lines in groupby(generate(spec), minute_of):
        yield list(lines)


def soak(servers: dict[str, str], probe: Probe, options: argparse.Namespace) -> list[Row]:
    """Send minute after minute, at an even pace; the fence follows. Prints each row."""
    producer = Producer(
        {"bootstrap.servers": servers["kafka"], "partitioner": "murmur2_random", "linger.ms": 20}
    )
    book = RedisBalances(probe.live, int(probe.live.get(redis_keys.EPOCH) or 0), 1_000_000)
    start_ms = window_start_ms(time.time_ns() // 1_000_000) - (MINUTES + 5) * WINDOW_MS
    effects = TransportEffects(duplicates=0.05, disorder=0.05, junk=0.01)
    minutes = MINUTES + TAPER_MINUTES
    spec = WorkloadSpec(
        seed=6,
        events=options.events_per_minute * minutes,
        start_ms=start_ms,
        minutes=minutes,
        transport=effects,
    )
    rows: list[Row] = []
    sent = 0
    begin = time.monotonic()
    print(" ".join(f"{field.name:>15}" for field in fields(Row)), flush=True)
    for minute, lines in enumerate(islice(by_minute(spec), MINUTES)):
        for number, line in enumerate(lines):
            due = begin + (minute + number / len(lines)) * options.seconds_per_minute
            if number % 50 == 0 and due > time.monotonic():
                producer.poll(0)
                time.sleep(max(due - time.monotonic(), 0))
            producer.produce(EVENTS, key=_key(line), value=line)
        for number in range(options.top_ups_per_minute):
            account = f"user/soak-{number}"
            message, _ = top_up_message(
                account, 1, request_id=None, reason="soak", actor="soak", now_ms=time.time_ns() // 1_000_000
            )
            producer.produce(COMMANDS, key=account.encode(), value=message)
        producer.flush(60)
        sent += len(lines)
        book.raise_fence(start_ms + (minute - options.live_minutes) * WINDOW_MS)
        rows.append(probe.row(minute, sent))
        print(" ".join(f"{_shown(value):>15}" for value in astuple(rows[-1])), flush=True)
    return rows


def _key(line: bytes) -> bytes | None:
    try:
        return decode_event(line).scope.encode()
    except Rejected:
        return None


def _shown(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def summary(rows: list[Row]) -> Iterator[str]:
    """For each column: the mean of the last quarter of the rows over that of the third."""
    quarter = len(rows) // 4
    third, last = rows[2 * quarter : 3 * quarter], rows[-quarter:]
    for field in fields(Row)[3:]:
        before = mean(getattr(row, field.name) for row in third)
        now = mean(getattr(row, field.name) for row in last)
        kind = "grows with what was done" if field.name in GROWING else "should be level"
        ratio = f"{now / before:.2f}" if before else "-"
        yield f"{field.name:>15}: {_shown(float(before)):>12} -> {_shown(float(now)):>12}  ratio {ratio}  ({kind})"


def main() -> None:
    """Run it, and print rows and summary."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--broker", choices=["tansu", "apache"], default="tansu")
    parser.add_argument("--events-per-minute", type=int, default=3_000, help="of event time")
    parser.add_argument("--top-ups-per-minute", type=int, default=30, help="of event time")
    parser.add_argument("--seconds-per-minute", type=float, default=6.0, help="real seconds an event-minute")
    parser.add_argument("--live-minutes", type=int, default=10, help="event-minutes that the fence is behind")
    parser.add_argument("--presence-minutes", type=int, default=15, help="presence_max, in event-minutes")
    options = parser.parse_args()
    speed = 60 / options.seconds_per_minute
    port = free_port()
    settings = {
        "METERING_FENCE_LAG_S": "2592000",
        "METERING_IDLE_TIMEOUT_S": str(max(round(300 / speed), 1)),
        "METERING_OUTBOX_RETENTION_S": str(round(600 / speed)),
        "METERING_EPOCH_INTERVAL_S": "2",
        "METERING_PRESENCE_MAX_S": str(options.presence_minutes * 60),
        "METERING_METRICS_PORT": str(port),
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        with everything(directory, options.broker, settings) as servers:
            host, _, http = servers["clickhouse"].rpartition("//")[2].partition(":")
            archive = get_client(host=host, port=int(http))
            probe = Probe(directory, redis.Redis.from_url(servers["redis"]), archive, port)
            rows = soak(servers, probe, options)
    print("\nmeans of the third quarter of the hour, and of the last:")
    for line in summary(rows):
        print(line)


if __name__ == "__main__":
    main()
