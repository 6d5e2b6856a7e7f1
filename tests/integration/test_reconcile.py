"""`metering reconcile` on real servers: the books agree at rest and under load; all tampering is named."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clickhouse_connect.driver.client import Client

from app.clients import clickhouse_client, redis_client
from app.emit import Emitter, emit_lines
from app.errors import CommandError
from app.repair.reconcile import reconcile
from app.workload import TransportEffects, WorkloadSpec, generate
from metering.reconcile import Comparison, Report
from schemas import redis_keys
from schemas.settings import Settings
from schemas.topics import EVENTS
from tests.support.processes import wait_until
from tests.support.world import World, running_world

HOUR_MS = 3_600_000
NEVER_S = "86400"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything runs, with a fence that moves often; nothing is repaired or compared by itself. The books have a
    live workload with junk, repeats and conflicts, and an hour-old session that froze."""
    with running_world(
        tmp_path_factory.mktemp("up"),
        epoch_interval_s="1",
        fence_interval_s="0.5",
        resettle_interval_s=NEVER_S,
        reconcile_interval_s=NEVER_S,
    ) as started:
        old = [usage(f"old-{number}", now_ms() - 2 * HOUR_MS, session="s-old") for number in range(3)]
        send(started, old)
        wait_until(lambda: not problems(run(started)), "the first events are settled")
        live = redis_client(started.settings)
        wait_until(
            lambda: int(live.get(redis_keys.FENCE) or 0) > now_ms() - 2 * HOUR_MS + 120_000, "the fence moves"
        )
        send(started, workload(1, 3_000))
        conflict = [
            usage("twice", now_ms(), session="s-conflict", asr=1_000),
            usage("twice", now_ms(), session="s-conflict", asr=2_000),
        ]
        send(started, conflict)
        started.top_up("user/u-rich", 5)
        terms = ("--from", instant(now_ms() - HOUR_MS), "--expires", instant(now_ms() + HOUR_MS))
        started.run("grant", "user/u-1", "10", *terms, "--request-id", "plan-1")
        wait_until(lambda: grants_in_redis(started), "the grant is in Redis")
        send(started, [usage("on-plan", now_ms(), session="s-plan")])
        yield started


def workload(seed: int, events: int, minutes: int = 5) -> list[bytes]:
    effects = TransportEffects(duplicates=0.05, disorder=0.1, junk=0.01)
    start_ms = now_ms() - minutes * 60_000
    spec = WorkloadSpec(seed=seed, start_ms=start_ms, events=events, minutes=minutes, transport=effects)
    return list(generate(spec))


def instant(time_ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_ms / 1000)) + f".{time_ms % 1000:03d}Z"


def grants_in_redis(world: World) -> bytes | None:
    found = redis_client(world.settings).hget(redis_keys.balance("user/u-1"), "grants")
    assert found is None or isinstance(found, bytes)
    return found


def usage(event_id: str, time_ms: int, *, session: str, asr: int = 100) -> bytes:
    return json.dumps(
        {
            "specversion": "1.0",
            "id": event_id,
            "source": "node/n-1",
            "type": "lingua.usage.utterance.v1",
            "time": instant(time_ms),
            "data": {
                "session_id": session,
                "user_id": "u-1",
                "node_id": "n-1",
                "utterance_id": f"ut-{event_id}",
                "asr_time_ms": asr,
                "nmt_time_ms": 0,
                "tts_time_ms": 0,
                "gpu_active_time_ms": 50,
            },
        }
    ).encode()


def send(world: World, lines: list[bytes], rate: float | None = None) -> None:
    with Emitter(world.settings.kafka, EVENTS) as emitter:
        emit_lines(lines, emitter, rate_per_s=rate)
    assert emitter.summary.failed == 0, emitter.summary.why()


def run(world: World, *, patience_s: float = 20.0, read_log: bool = True) -> Report:
    return reconcile(world.settings, say=print, patience_s=patience_s, read_log=read_log)


def problems(report: Report) -> list[str]:
    """Everything that is not as it should be, in words that a failed test can show."""
    return [
        *(f"{each.name}: {difference}" for each in report.comparisons for difference in each.first),
        *report.unproven,
    ]


def drifting(report: Report) -> dict[str, Comparison]:
    return {each.name: each for each in report.comparisons if each.differing}


def archive(world: World) -> Client:
    return clickhouse_client(world.settings)


@contextmanager
def tampered(world: World, table: str, *changes: str) -> Iterator[None]:
    """A table with changes (the rest of `ALTER TABLE`), which is as it was afterwards."""
    client = archive(world)
    client.command(f"CREATE TABLE lingua.kept AS lingua.{table}")
    client.command(f"INSERT INTO lingua.kept SELECT * FROM lingua.{table}")
    try:
        for change in changes:
            client.command(f"ALTER TABLE lingua.{table} {change}", settings={"mutations_sync": 2})
        yield
    finally:
        client.command(f"TRUNCATE TABLE lingua.{table}")
        client.command(f"INSERT INTO lingua.{table} SELECT * FROM lingua.kept")
        client.command("DROP TABLE lingua.kept")


@pytest.fixture(scope="module")
def at_rest(world: World) -> Report:
    """The first report that agrees: the flows have caught up."""
    report = run(world, patience_s=60.0)
    assert problems(report) == []
    return report


def test_at_rest_everything_agrees(at_rest: Report) -> None:
    """Every store says the same; the report says what it compared, as JSON."""
    assert (at_rest.status, at_rest.drift, at_rest.exit_code) == ("agrees", False, 0)
    assert (at_rest.drift_us, at_rest.accounts_drifting) == (0, 0)
    checked = {each.name: each.checked for each in at_rest.comparisons}
    assert all(checked.values()), checked
    assert checked["ledger"] == checked["redis_ledger"] == checked["ledger_redis"]
    cells = at_rest.comparison("cells").figures
    assert cells["frozen"] > 0 < cells["live"]
    messages = at_rest.comparison("log_store").figures
    assert messages["messages"] == messages["accepted"] + messages["refused"]
    assert messages["conflicts"] == 1
    assert messages["refused"] > 0 < messages["duplicates"]
    assert messages["dead letters"] == messages["refused"] + messages["conflicts"]
    shown = json.loads(at_rest.to_json())
    assert shown["status"] == "agrees"
    assert [each["name"] for each in shown["comparisons"]] == [each.name for each in at_rest.comparisons]
    assert shown["cut"]["offsets"].keys() == {"0", "1", "2", "3"}


def test_it_agrees_while_load_is_flowing(world: World, at_rest: Report) -> None:
    """Cut after cut on a system that never pauses, with hot rooms: no false alarm, and nothing left open."""
    enough = threading.Event()

    def load() -> None:
        seed = 2
        while not enough.is_set():
            send(world, workload(seed, 400), rate=200)
            seed += 1

    sender = threading.Thread(target=load)
    sender.start()
    try:
        reports = [run(world, patience_s=60.0) for _ in range(4)]
    finally:
        enough.set()
        sender.join()
    # The other tests tamper with stores that nobody writes to.
    reports.append(run(world, patience_s=60.0))
    assert [problems(report) for report in reports] == [[]] * len(reports)
    entries = [report.cut["last_entry"] for report in reports]
    assert entries == sorted(set(entries))
    assert any(report.comparison("cells").figures["looked at again"] for report in reports)


def test_a_changed_balance_is_named(world: World, at_rest: Report) -> None:
    """A balance in Redis that its ledger line did not leave."""
    live = redis_client(world.settings)
    live.hincrby(redis_keys.balance("user/u-rich"), "balance_us", 7)
    try:
        report = run(world, read_log=False)
    finally:
        live.hincrby(redis_keys.balance("user/u-rich"), "balance_us", -7)
    assert drifting(report).keys() == {"redis_ledger"}
    found = report.comparison("redis_ledger")
    assert (found.differing, found.drift_us, found.accounts_drifting) == (1, 7, 1)
    assert (found.first[0].kind, found.first[0].where) == ("balance differs", "user/u-rich")
    assert (found.first[0].found, found.first[0].expected) == (300_000_007, 300_000_000)
    assert (report.status, report.exit_code) == ("drift", 1)


def test_grants_that_redis_lost_are_named(world: World, at_rest: Report) -> None:
    """The balance is as the ledger says; what would expire of it is not."""
    assert at_rest.comparison("redis_ledger").figures["accounts with grants"] == 1
    live = redis_client(world.settings)
    kept = grants_in_redis(world)
    assert kept is not None
    live.hdel(redis_keys.balance("user/u-1"), "grants")
    try:
        report = run(world, read_log=False)
    finally:
        live.hset(redis_keys.balance("user/u-1"), "grants", kept)
    assert drifting(report).keys() == {"redis_ledger"}
    [difference] = report.comparison("redis_ledger").first
    assert (difference.kind, difference.where, difference.found) == ("grants differ", "user/u-1", {})
    [(grant_id, left_us)] = difference.expected.items()
    assert grant_id == "plan-1"
    assert 0 < left_us < 600_000_000
    assert report.drift_us == left_us


def test_an_account_that_redis_lacks_is_named(world: World, at_rest: Report) -> None:
    """The ledger knows of it, Redis does not."""
    live = redis_client(world.settings)
    kept: dict[bytes, bytes] = live.hgetall(redis_keys.balance("user/u-rich"))  # type: ignore[assignment]
    live.delete(redis_keys.balance("user/u-rich"))
    try:
        report = run(world, read_log=False)
    finally:
        live.hset(redis_keys.balance("user/u-rich"), mapping=kept)  # type: ignore[arg-type]
    assert drifting(report).keys() == {"ledger_redis"}
    [difference] = report.comparison("ledger_redis").first
    assert (difference.kind, difference.where) == ("missing in Redis", "user/u-rich")
    assert report.comparison("ledger_redis").drift_us == 300_000_000


def test_an_account_that_the_ledger_lacks_is_named(world: World, at_rest: Report) -> None:
    """Money out of nothing."""
    live = redis_client(world.settings)
    key = redis_keys.balance("user/u-forged")
    live.hset(key, mapping={"balance_us": 5, "seq": 1})
    try:
        report = run(world, read_log=False)
    finally:
        live.delete(key)
    [difference] = report.comparison("redis_ledger").first
    assert (difference.kind, difference.where) == ("no such line in the ledger", "user/u-forged")


def test_a_deleted_ledger_line_is_found(world: World, at_rest: Report) -> None:
    """In the middle of a chain: the account has a gap, its cell and its entry do not sum to zero, and the cell is
    not what its events say."""
    with tampered(world, "ledger", "DELETE WHERE account = 'node/n-1' AND seq = 1"):
        report = run(world, patience_s=3.0, read_log=False)
    assert drifting(report).keys() == {"ledger", "cells"}
    ledger = report.comparison("ledger")
    assert set(ledger.kinds) == {
        "line missing",
        "balances do not sum to zero",
        "cell does not sum to zero",
        "outbox entry does not sum to zero",
    }
    assert ("line missing", "node/n-1") in {(each.kind, each.where) for each in ledger.first}
    assert report.comparison("cells").differing == 1


def test_a_changed_ledger_line_is_found(world: World, at_rest: Report) -> None:
    """An amount that was edited together with its balance: the next line does not begin there."""
    with tampered(
        world,
        "ledger",
        "UPDATE change_us = change_us + 1, balance_after_us = balance_after_us + 1 "
        "WHERE account = 'platform/revenue' AND seq = 2",
    ):
        report = run(world, patience_s=3.0, read_log=False)
    ledger = report.comparison("ledger")
    assert ledger.kinds["chain broken"] == 1
    assert ledger.kinds["cell does not sum to zero"] == 1
    assert ledger.kinds["balances do not sum to zero"] == 1
    assert "platform/revenue" in {each.where for each in ledger.first}


def test_two_changes_that_make_up_for_each_other_are_found(world: World, at_rest: Report) -> None:
    """Moved from one cell to another, the books still sum to zero; the two cells do not."""
    found = archive(world).query(
        "SELECT account, seq FROM lingua.ledger FINAL WHERE account = 'platform/revenue' AND change_us != 0 "
        "ORDER BY seq LIMIT 2"
    )
    (account, first), (_, second) = found.result_rows
    change = f"UPDATE change_us = change_us + if(seq = {first}, 9, -9) WHERE account = '{account}' "
    with tampered(world, "ledger", change + f"AND seq IN ({first}, {second})"):
        report = run(world, patience_s=3.0, read_log=False)
    kinds = report.comparison("ledger").kinds
    assert kinds["cell does not sum to zero"] == 2
    assert "balances do not sum to zero" not in kinds
    assert report.comparison("cells").differing == 2


def test_deleted_usage_is_found(world: World, at_rest: Report) -> None:
    """The cell's charge has no reason any more, and the log has what the store lacks."""
    with tampered(world, "usage_events", "DELETE WHERE scope = 'session/s-conflict'"):
        report = run(world, patience_s=3.0)
    assert drifting(report).keys() == {"cells", "log_store"}
    cells = report.comparison("cells")
    assert cells.kinds == {"live cell differs": 1}
    assert cells.first[0].where.startswith("session/s-conflict@")
    assert cells.first[0].found["user/u-1"] == -1_000_000
    assert cells.first[0].expected["user/u-1"] == 0
    assert report.comparison("log_store").kinds == {"missing in the store": 2}


def test_changed_usage_is_found(world: World, at_rest: Report) -> None:
    """Other times than the log says, and a price that is not that of the rate card."""
    with tampered(
        world, "usage_events", "UPDATE asr_time_ms = asr_time_ms + 1 WHERE scope = 'session/s-conflict'"
    ):
        report = run(world, patience_s=3.0)
    assert drifting(report).keys() == {"cells", "prices", "log_store"}
    assert report.comparison("prices").drift_us == 1_000
    assert report.comparison("log_store").kinds["stored with another body"] == 1


def test_usage_that_the_log_never_had_is_found(world: World, at_rest: Report) -> None:
    """A row slipped into the store, at a place of the log that says something else."""
    client = archive(world)
    with tampered(world, "usage_events"):
        client.command(
            "INSERT INTO lingua.usage_events SELECT * REPLACE ('forged' AS id) FROM lingua.usage_events "
            "WHERE scope = 'session/s-conflict'"
        )
        report = run(world, patience_s=3.0)
    assert drifting(report).keys() == {"cells", "log_store"}
    assert report.comparison("log_store").kinds["in the store, not in the log"] >= 1


def test_deleted_dead_letters_are_found(world: World, at_rest: Report) -> None:
    """One of a refused message, one of a conflict."""
    with tampered(world, "dead_letters", "DELETE WHERE reason IN ('identity_conflict', 'not_json')"):
        report = run(world, patience_s=3.0)
    assert drifting(report).keys() == {"log_store"}
    kinds = report.comparison("log_store").kinds
    assert kinds["no dead letter for a conflict"] == 1
    assert kinds["no dead letter for a refused message"] >= 1
    assert report.comparison("log_store").first[0].where.startswith(f"{EVENTS}/")


def test_a_dead_letter_with_other_bytes_is_found(world: World, at_rest: Report) -> None:
    """Bytes are kept as they came."""
    with tampered(world, "dead_letters", "UPDATE value = 'x' WHERE reason = 'identity_conflict'"):
        report = run(world, patience_s=3.0)
    assert report.comparison("log_store").kinds == {"dead letter with other bytes": 1}


def test_a_ledger_that_is_behind_is_unproven(world: World, at_rest: Report) -> None:
    """Redis announces an entry that the ledger never gets: nothing differs, but nothing is proven."""
    live = redis_client(world.settings)
    ledger = world.pid_of("ledger")
    assert ledger is not None
    # The fence goes on moving, and the ledger would say how far it is.
    os.kill(ledger, signal.SIGSTOP)
    stored = int(live.get(redis_keys.LEDGER_STORED) or 0)
    live.set(redis_keys.LEDGER_STORED, stored - 5)
    try:
        report = run(world, patience_s=1.0, read_log=False)
    finally:
        live.set(redis_keys.LEDGER_STORED, stored)
        os.kill(ledger, signal.SIGCONT)
    assert (report.status, report.drift, report.exit_code) == ("unproven", False, 1)
    missing = report.cut["last_entry"] - (stored - 5)
    assert missing >= 5
    assert report.comparison("flows").unproven == {"the ledger is behind, by so many outbox entries": missing}


def test_without_an_epoch_it_says_so(world: World, at_rest: Report) -> None:
    """An empty Redis is nothing to compare with."""
    live = redis_client(world.settings)
    epoch = live.getdel(redis_keys.EPOCH)
    try:
        with pytest.raises(CommandError, match="Redis has no epoch"):
            run(world)
    finally:
        live.set(redis_keys.EPOCH, epoch or 1)


@pytest.mark.parametrize("server", ["kafka", "redis", "clickhouse"])
def test_a_server_that_is_away_is_one_line(world: World, at_rest: Report, server: str) -> None:
    """It names the setting."""
    gone = {"kafka": "127.0.0.1:9", "redis": "redis://127.0.0.1:9/0", "clickhouse": "http://127.0.0.1:9"}
    settings = Settings(**(world.settings.model_dump() | {server: gone[server]}))
    with pytest.raises(CommandError, match=f"METERING_{server.upper()}") as failure:
        reconcile(settings, say=print)
    assert "\n" not in str(failure.value)


def test_late_usage_is_pending_until_a_resettle(world: World, at_rest: Report, tmp_path: Path) -> None:
    """It is drift of its own kind, and a resettle clears it. A late conflict moves nothing and has no letter."""
    from app.repair.resettle import run_resettle

    at_ms = now_ms() - 2 * HOUR_MS
    late = [usage("late", at_ms, session="s-old", asr=500), usage("old-0", at_ms, session="s-old", asr=90)]
    send(world, late)
    report = run(world, patience_s=20.0)
    assert drifting(report).keys() == {"cells"}, problems(report)
    cells = report.comparison("cells")
    assert cells.kinds == {"pending_resettle": 1}
    assert cells.drift_us == 500_000 + 25_000
    assert report.comparison("log_store").figures["late conflicts without a letter"] == 1
    settings = world.settings.model_copy(update={"state_dir": tmp_path})
    assert run_resettle(settings).cells == 1
    assert problems(run(world)) == []
