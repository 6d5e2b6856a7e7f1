"""`make chaos`, small: a seeded round passes, and a system that is tampered with does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from chaos.keeper import Stuck
from chaos.load import LoadShape, Parcel, Sender, digest, parcels
from chaos.plan import Round
from chaos.probes import Prober
from chaos.rounds import Judge, Played
from chaos.world import World
from metering.money import REVENUE
from schemas import redis_keys
from schemas.topics import COMMANDS, EVENTS
from tests.support.commands import clean_environment
from tests.support.services import chosen_broker

PATIENCE_S = 60.0
NO_PATIENCE_S = 0.0


def test_a_seeded_round_of_kills_agrees(tmp_path: Path) -> None:
    """Flows, Redis and ClickHouse are killed under load, from outside and at named points; exit code 0."""
    record = tmp_path / "rounds.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "chaos", "--seed", "11", "--rounds", "1", "--scene", "kills", "--quick"),
            *("--faults", "4", "--rate", "60", "--broker", chosen_broker()),
            *("--dir", str(tmp_path / "worlds"), "--json", str(record)),
        ],
        env=clean_environment(),
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    [played] = [json.loads(line) for line in record.read_text().splitlines()]
    assert played["passed"]
    assert sum(played["differences"].values()) == 0
    assert sum(sum(fault["kills"].values()) for fault in played["faults"]) >= 4
    assert played["cell_lines"] > 50
    # A world that agreed leaves nothing behind.
    assert list((tmp_path / "worlds").glob("*")) == []


class Settled:
    """A world at rest, with everything that a judge needs."""

    def __init__(self, world: World, sender: Sender) -> None:
        self.world = world
        self.acknowledged = sender.acknowledged
        self._judge = Judge(world)

    def differences(self, patience_s: float = NO_PATIENCE_S) -> dict[str, int]:
        """How many of each sort the comparison finds."""
        played = Played(1, 1, "live", Round(1, "kills", ()))
        self._judge.judge(self.acknowledged, played, late_allowed=False, patience_s=patience_s)
        return {name: len(found) for name, found in played.verdict.sorts() if found}


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settled]:
    """Some hundred messages, settled and stored."""
    world = World(tmp_path_factory.mktemp("chaos"), chosen_broker())
    try:
        world.start_servers()
        world.prepare()
        world.start_flows({"epoch_interval_s": "1"})
        sender = Sender(world.settings.kafka, quick_reconnect=True)
        now_ms = int(world.live.time()[0]) * 1000
        for parcel in islice(parcels("tamper", LoadShape(20), now_ms), 700):
            sender.send(parcel)
        prober = Prober(world, sender, "tamper")
        probe = prober.send()
        sender.stop()
        world.keeper.wait_until(lambda: prober.through(probe), "all is settled", 90.0)
        yield Settled(world, sender)
    finally:
        world.stop()


def test_what_was_not_tampered_with_agrees(settled: Settled) -> None:
    """The same world, first, as it is."""
    assert settled.differences(PATIENCE_S) == {}


def test_a_microsecond_more_on_a_balance_is_reported(settled: Settled) -> None:
    """In Redis alone: that account, and the sum over all."""
    key = redis_keys.balance(REVENUE)
    assert settled.differences(PATIENCE_S) == {}
    settled.world.live.hincrby(key, "balance_us", 1)
    try:
        assert settled.differences() == {"wrong balances": 1, "not zero": 1}
    finally:
        settled.world.live.hincrby(key, "balance_us", -1)


def test_a_ledger_line_that_is_gone_is_reported(settled: Settled) -> None:
    """Somebody's only charge disappears from the ledger: lost, out of balance, and his chain ends early."""
    assert settled.differences(PATIENCE_S) == {}
    archive, database = settled.world.archive(), settled.world.settings.clickhouse_database
    where = "account = 'user/probe-tamper-1-0'"
    assert archive.query(f"SELECT count() FROM `{database}`.ledger FINAL WHERE {where}").result_rows == [(1,)]
    archive.command(
        f"CREATE TABLE `{database}`.kept ENGINE = Memory AS SELECT * FROM `{database}`.ledger WHERE {where}"
    )
    archive.command(f"ALTER TABLE `{database}`.ledger DELETE WHERE {where} SETTINGS mutations_sync = 2")
    try:
        assert settled.differences() == {"lost": 1, "not zero": 1, "wrong balances": 1}
    finally:
        archive.command(f"INSERT INTO `{database}`.ledger SELECT * FROM `{database}`.kept")
        archive.command(f"DROP TABLE `{database}`.kept")


def test_a_charge_made_twice_is_reported(settled: Settled) -> None:
    """A line is written again under the next number, before and after in order, and Redis agrees with it."""
    assert settled.differences(PATIENCE_S) == {}
    archive, database = settled.world.archive(), settled.world.settings.clickhouse_database
    account = "user/probe-tamper-1-1"
    archive.command(
        f"INSERT INTO `{database}`.ledger SELECT * REPLACE (seq + 1 AS seq, balance_after_us AS balance_before_us, "
        f"balance_after_us + change_us AS balance_after_us) FROM `{database}`.ledger FINAL "
        f"WHERE account = '{account}'"
    )
    change_us = archive.query(
        f"SELECT any(change_us) FROM `{database}`.ledger WHERE account = '{account}'"
    ).result_rows[0][0]
    key = redis_keys.balance(account)
    settled.world.live.hincrby(key, "balance_us", change_us)
    try:
        found = settled.differences()
        assert found == {"charged twice": 1, "not zero": 2, "wrong balances": 1}
    finally:
        settled.world.live.hincrby(key, "balance_us", -change_us)
        archive.command(
            f"ALTER TABLE `{database}`.ledger DELETE WHERE account = '{account}' AND seq = 2 "
            "SETTINGS mutations_sync = 2"
        )


def test_a_message_that_the_broker_lost_is_reported(settled: Settled) -> None:
    """What was acknowledged and is not in the log would otherwise be missing on both sides."""
    lost = Parcel(EVENTS, None, b"acknowledged, they said")
    acknowledged = {
        EVENTS: settled.acknowledged[EVENTS] | {digest(lost.value)},
        COMMANDS: settled.acknowledged[COMMANDS],
    }
    played = Played(1, 1, "live", Round(1, "kills", ()))
    with pytest.raises(Stuck, match="the broker lost 1 messages"):
        Judge(settled.world).judge(acknowledged, played, late_allowed=False)
