"""What is in the directory survives a restart, and the books go on from it."""

from __future__ import annotations

import time
from pathlib import Path

from app.embedded.broker import kafka_answers
from tests.support.commands import metering
from tests.support.processes import wait_until
from tests.support.world import World, running_world


def generated(path: Path, seed: int, first_minute: int) -> Path:
    """Three minutes of events that start so many minutes from now."""
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + first_minute * 60))
    options = ("--seed", str(seed), "--events", "1500", "--minutes", "3", "--start", start)
    made = metering("generate", *options, "--duplicates", "0.1", "--disorder", "0.1", "--out", str(path))
    assert made.returncode == 0, made.stderr.decode()
    return path


def stored(world: World) -> int:
    return int(str(world.query("SELECT count() FROM {database}.usage_events FINAL")[0][0]))


def test_balances_ledger_and_usage_survive_and_the_next_log_is_settled_too(tmp_path: Path) -> None:
    """Stopped and started again: the same balances and rows; then new events, on a fresh log where the broker
    forgets, are charged on top, and the chains go on without a gap."""
    with running_world(tmp_path / "up", epoch_interval_s="1") as world:
        world.emit(generated(tmp_path / "first.jsonl", 31, -12))
        world.top_up("user/u-somebody", 5)
        assert world.disagreements() == []
        wait_until(lambda: stored(world) > 1_300, "usage is stored")
        before = stored(world)
    with running_world(tmp_path / "up", epoch_interval_s="1") as again:
        again.messages, again.top_ups_us = world.messages, world.top_ups_us
        assert again.disagreements() == []
        assert stored(again) == before
        again.emit(generated(tmp_path / "second.jsonl", 32, -4))
        assert again.disagreements() == []
        wait_until(lambda: stored(again) > before, "usage of the next log is stored")


def test_a_broker_that_forgets_is_noticed_while_everything_runs(tmp_path: Path) -> None:
    """Killed under the flows' feet, the embedded broker comes back empty: the supervisor says so, the flows go
    on with the fresh log, and what was charged stays charged."""
    with running_world(tmp_path / "up", epoch_interval_s="1") as world:
        world.emit(generated(tmp_path / "first.jsonl", 33, -12))
        assert world.disagreements() == []
        log = tmp_path / "up" / "up.log"
        world.kill("broker")
        wait_until(lambda: "starting it again" in log.read_text(), "the death is noticed")
        if not world.has_append_time:
            wait_until(lambda: "going on with a fresh log" in log.read_text(), "the fresh log is adopted", 60)
        port = int(world.addresses["kafka"].rpartition(":")[2])
        wait_until(lambda: kafka_answers(port), "the broker answers again", 60)
        world.emit(generated(tmp_path / "second.jsonl", 34, -4))
        assert world.disagreements(90) == []
