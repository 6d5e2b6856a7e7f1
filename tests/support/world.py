"""`metering up` as a test runs it: driven through the command line and Kafka alone."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from app import proof
from app.clients import clickhouse_client, redis_client
from metering.settle import settle_lines
from schemas.rate_card import load_rate_card
from schemas.settings import Settings
from tests.support.commands import clean_environment, metering
from tests.support.processes import children, wait_until

MARKS = {
    "broker": ("tansu", "kafka.Kafka"),
    "redis": ("valkey-server",),
    "clickhouse": ("app.embedded.clickhouse",),
}
"""What tells a server's command line."""

BROKERS = {"": "tansu", "tansu": "tansu", "apache": "apache"}
START_DEADLINE_S = 120.0


@dataclass
class World:
    """Running services, and everything that was ever sent to them, so that tests may follow in any order."""

    addresses: dict[str, str]
    has_append_time: bool
    pid: int
    """Of the supervisor."""
    directory: Path
    """Where everything is kept."""
    messages: list[bytes] = field(default_factory=list)
    top_ups_us: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """For commands that shall talk to this world."""
        return clean_environment(
            **self.addresses,
            broker_append_time=str(self.has_append_time).lower(),
            state_dir=str(self.directory),
        )

    @property
    def accounts_url(self) -> str:
        """Of the accounts API."""
        port = json.loads((self.directory / "ports.json").read_text())["accounts"]
        return f"http://127.0.0.1:{port}"

    @property
    def settings(self) -> Settings:
        """For clients that shall talk to this world."""
        return Settings(
            kafka=self.addresses["kafka"],
            redis=self.addresses["redis"],
            clickhouse=self.addresses["clickhouse"],
            broker_append_time=self.has_append_time,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command against this world; fails the test unless it succeeds."""
        done = metering(*arguments, environment=self.environment)
        assert done.returncode == 0, done.stderr.decode()
        return done

    def emit(self, path: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
        """Send a file of messages and remember them."""
        done = self.run("emit", str(path), *options)
        self.messages += path.read_bytes().split(b"\n")
        return done

    def top_up(self, account: str, minutes: int, *options: str) -> None:
        """Give minutes and remember it."""
        self.run("topup", account, str(minutes), *options)
        self.top_ups_us[account] = self.top_ups_us.get(account, 0) + minutes * 60_000_000

    def disagreements(self, timeout_s: float = 60.0) -> list[str]:
        """What Redis, ledger and the pure settlement of all messages do not agree on, given time to."""
        settled, _ = settle_lines(self.messages, load_rate_card(None))
        expected = proof.expected_balances(settled, self.top_ups_us)
        live, archive = redis_client(self.settings), clickhouse_client(self.settings)
        deadline_s = time.monotonic() + timeout_s
        while True:
            ledger = proof.ledger_balances(archive, self.settings.clickhouse_database)
            found = proof.disagreements(expected, proof.live_balances(live), ledger)
            if not found or time.monotonic() > deadline_s:
                return found
            time.sleep(0.2)

    def pid_of(self, name: str) -> int | None:
        """The process of a server ("broker", "redis", "clickhouse") or a flow, as the supervisor's child."""
        marks = MARKS.get(name, (f"app.dataflows:{name}()",))
        found = [pid for pid, line in children(self.pid).items() if any(mark in line for mark in marks)]
        return found[0] if found else None

    def kill(self, name: str) -> None:
        """SIGKILL, as soon as it runs."""
        wait_until(lambda: self.pid_of(name) is not None, f"{name} runs", 60)
        pid = self.pid_of(name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def stop_server(self, name: str, meanwhile: Callable[[], object]) -> None:
        """Kill a server and do something to what it leaves before the supervisor starts it again."""
        pid = self.pid_of(name)
        assert pid is not None
        # The supervisor is held still, so that it cannot be faster.
        os.kill(self.pid, signal.SIGSTOP)
        try:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", f"{name} is dead", 10)
            meanwhile()
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Rows from ClickHouse; `{database}` stands for the database."""
        client = clickhouse_client(self.settings)
        sql = sql.replace("{database}", self.settings.clickhouse_database)
        return [tuple(row) for row in client.query(sql).result_rows]


@contextmanager
def running_world(directory: Path, **settings: str) -> Iterator[World]:
    """`metering up` on the broker that METERING_TEST_BROKER names; it must start and end as it should."""
    broker = BROKERS[os.environ.get("METERING_TEST_BROKER", "")]
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "up.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "up", "--dir", str(directory / "data"), "--broker", broker],
            env=clean_environment(**settings),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
        line = process.stdout.readline() if readable else b""
        assert line, f"metering up did not start: {log.read_text()}"
        yield World(
            json.loads(line),
            has_append_time=broker == "apache",
            pid=process.pid,
            directory=directory / "data",
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        finally:
            process.kill()
            process.wait()
    assert code == 0, log.read_text()
