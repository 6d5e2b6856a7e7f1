"""Late events, outages, and a Redis that is empty or came back without its end: at rest the bill is whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.clients import redis_client
from schemas import redis_keys
from schemas.rfc3339 import format_rfc3339_ms
from tests.support.commands import metering
from tests.support.processes import wait_until
from tests.support.world import World, running_world

MINUTE_MS = 60_000
DAY_MS = 86_400_000


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world whose fence stands right behind what was settled."""
    with running_world(tmp_path, fence_lag_s="60", fence_interval_s="0.5", epoch_interval_s="1") as running:
        yield running


def usage(number: int, time_ms: int, user: str = "u-1", room: str | None = "r-1", asr_ms: int = 101) -> bytes:
    data = {
        "session_id": "s-1", "user_id": user, "node_id": "n-1", "utterance_id": f"ut-{number}",
        "asr_time_ms": asr_ms, "nmt_time_ms": 0, "tts_time_ms": 0, "gpu_active_time_ms": 50,
    }  # fmt: skip
    if room is not None:
        data["room_id"] = room
    return _event(f"usage-{number}", "lingua.usage.utterance.v1", time_ms, data)


def joined(user: str, time_ms: int) -> bytes:
    return _event(f"join-{user}", "lingua.room.joined.v1", time_ms, {"room_id": "r-1", "user_id": user})


def _event(number: str, kind: str, time_ms: int, data: dict[str, object]) -> bytes:
    event = {"specversion": "1.0", "id": number, "source": "node/n-1", "type": kind}
    return json.dumps({**event, "time": format_rfc3339_ms(time_ms), "data": data}).encode()


def send(world: World, tmp_path: Path, *events: bytes) -> None:
    path = tmp_path / f"events-{time.time_ns()}.jsonl"
    path.write_bytes(b"\n".join(events))
    world.emit(path)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def fence_ms(world: World) -> int:
    return int(redis_client(world.settings).get(redis_keys.FENCE) or 0)


def resettle(world: World, *options: str) -> dict[str, int]:
    return json.loads(world.run("resettle", "--json", *options).stdout)


def test_late_usage_and_membership_are_settled_by_resettle(world: World, tmp_path: Path) -> None:
    """By minutes and by days, on a node whose clock is wrong either way, and after the window froze."""
    now = now_ms()
    send(world, tmp_path, joined("u-1", now - 20_000), usage(1, now - 10_000), usage(2, now + 200_000))
    wait_until(lambda: fence_ms(world) > 0, "the fence stands", 30)
    late = [
        usage(3, now - 10 * MINUTE_MS),
        usage(4, now - 40 * DAY_MS, user="u-2"),
        usage(5, now - 40 * DAY_MS, user="u-3", room=None),
        joined("u-9", now - 11 * MINUTE_MS),
    ]
    send(world, tmp_path, *late)
    send(world, tmp_path, *late)
    assert world.disagreements(timeout_s=3), "late usage is charged by nobody but resettle"
    first = resettle(world)
    assert first["cells"] == 3
    assert world.disagreements() == []
    again = resettle(world)
    everything = resettle(world, "--since", "1970-01-01T00:00:00Z")
    assert (again["cells"], everything["cells"]) == (0, 0)
    assert everything["scopes"] == 2


def test_an_outage_longer_than_the_fences_distance_makes_nobody_late(tmp_path: Path) -> None:
    """The flow stands still for twice the lag; what was sent meanwhile is charged live, without any resettle."""
    with running_world(
        tmp_path, fence_lag_s="5", fence_interval_s="0.5", epoch_interval_s="1", resettle_interval_s="3600"
    ) as world:
        # A minute that begins now is frozen at the earliest 65 s from now, unless it is counted from the clock.
        now = now_ms()
        send(world, tmp_path, usage(1, now))
        wait_until(lambda: fence_ms(world) > 0, "the fence stands", 30)
        pid = world.pid_of("settlement")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            stood_at = fence_ms(world)
            send(world, tmp_path, *(usage(number, now + number) for number in range(2, 40)))
            time.sleep(10)
            assert fence_ms(world) == stood_at
        finally:
            os.kill(pid, signal.SIGCONT)
        assert world.disagreements(timeout_s=30) == []


def test_an_empty_redis_is_refused_and_rebuilt(world: World, tmp_path: Path) -> None:
    """Balances, numbers of lines, requests and floors come back; what the ledger lacked is settled anew."""
    now = now_ms()
    world.top_up("user/u-1", 5, "--request-id", "q-1")
    world.run("floor", "user/u-1", "--minutes", "-7")
    send(world, tmp_path, joined("u-2", now - 5_000), usage(1, now - 4_000), usage(2, now - 3_000, room=None))
    assert world.disagreements() == []
    client = redis_client(world.settings)
    client.flushall()
    refused = metering("migrate", environment=world.environment)
    assert refused.returncode == 1
    assert b"rebuild-balances" in refused.stderr
    send(world, tmp_path, usage(3, now - 2_000))
    rebuilt = json.loads(world.run("rebuild-balances", "--json").stdout)
    assert rebuilt["epoch"] == 2
    assert rebuilt["requests"] == 1
    wait_until(lambda: resettle(world)["superseded"] is False, "resettle ran", 60)
    assert world.disagreements() == []
    assert client.hget(redis_keys.balance("user/u-1"), "floor_us") == b"-420000000"
    world.run("topup", "user/u-1", "5", "--request-id", "q-1")
    later = now_ms() + 2 * MINUTE_MS
    send(world, tmp_path, usage(4, later))
    assert world.disagreements() == [], "the flows go on by themselves, and a request counts once for ever"
    again = json.loads(world.run("rebuild-balances", "--json").stdout)
    assert again["epoch"] == 3
    resettle(world)
    assert world.disagreements() == []


def test_a_redis_that_lost_its_end_is_refused_and_rebuilt(world: World, tmp_path: Path) -> None:
    """An older copy of its data comes back: no script runs on it, whoever calls first."""
    now = now_ms()
    data = Path(world.directory) / "redis"
    world.top_up("user/u-1", 5)
    send(world, tmp_path, usage(1, now - 4_000))
    assert world.disagreements() == []
    shutil.copytree(data, tmp_path / "older")
    send(world, tmp_path, usage(2, now - 3_000), usage(3, now - 2_000, room=None))
    world.top_up("user/u-1", 7)
    assert world.disagreements() == []
    client = redis_client(world.settings)
    world.stop_server("redis", lambda: (shutil.rmtree(data), shutil.copytree(tmp_path / "older", data)))
    send(world, tmp_path, usage(4, now - 1_000))
    wait_until(lambda: _epoch(client) is None, "the loss is noticed", 60)
    world.run("rebuild-balances")
    wait_until(lambda: resettle(world)["superseded"] is False, "resettle ran", 60)
    assert world.disagreements() == []


def _epoch(client: object) -> bytes | None:
    try:
        return client.get(redis_keys.EPOCH)  # type: ignore[attr-defined,no-any-return]
    except Exception:
        return b"away"
