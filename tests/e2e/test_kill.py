"""Flows and servers are killed under load, and nothing is lost or charged twice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from metering.settle import Settling
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected
from tests.support.commands import metering
from tests.support.processes import wait_until
from tests.support.world import running_world

VICTIMS = (
    "settlement",
    "usage_store",
    "ledger",
    "redis",
    "settlement",
    "clickhouse",
    "usage_store",
    "ledger",
)


def counts_as_usage(settling: Settling, message: bytes) -> bool:
    """Whether the message is an utterance that counts, and not a repeat."""
    try:
        event = decode_event(message)
        return settling.add(event) and isinstance(event, Usage)
    except Rejected:
        return False


def test_everyone_is_killed_under_load_and_the_books_agree(tmp_path: Path) -> None:
    """SIGKILL for each flow, twice, and for Redis and ClickHouse, while events come in; then Redis, ledger and
    settle agree."""
    events = tmp_path / "events.jsonl"
    made = metering(
        *("generate", "--seed", "21", "--events", "14000", "--duplicates", "0.1", "--disorder", "0.2"),
        *("--junk", "0.002", "--out", str(events)),
    )
    assert made.returncode == 0, made.stderr.decode()
    with running_world(tmp_path / "up", epoch_interval_s="1") as world:
        emitting = subprocess.Popen(
            [sys.executable, "-m", "app", "emit", str(events), "--rate", "800"],
            env=world.environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            for victim in VICTIMS:
                time.sleep(1.5)
                world.kill(victim)
            assert emitting.wait(120) == 0
        finally:
            emitting.kill()
            emitting.wait()
        world.messages += events.read_bytes().split(b"\n")
        assert world.disagreements(90) == []
        events_in = Settling(load_rate_card(None))
        usage = sum(counts_as_usage(events_in, message) for message in world.messages if message)
        stored = "SELECT count() FROM {database}.usage_events FINAL"
        wait_until(lambda: world.query(stored) == [(usage,)], f"{usage} usage events are stored", 90)
