"""A thousand at the same moment on one account: as many come in as the arithmetic allows, and no books go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest
import redis

from clients.scheduler import Hold, Reason, Scheduler
from metering.live import CellPosting, Emission
from schemas import redis_keys
from sinks.balances import RedisBalances
from tests.support.admission import client, holds, set_balance
from tests.support.admission_load import HOLD, USER

ROOT = Path(__file__).resolve().parents[2]
SESSIONS = 1_000
PROCESSES = 4

SNAPSHOT = """
local sum, sessions = 0, 0
local amounts = redis.call('HGETALL', KEYS[2])
for i = 1, #amounts, 2 do
  if amounts[i] ~= '/total' then
    sum, sessions = sum + tonumber(amounts[i + 1]), sessions + 1
  end
end
local held = redis.call('HGET', KEYS[1], 'held_us') or '0'
return {held, string.format('%.0f', sum), sessions, redis.call('ZCARD', KEYS[3])}
"""


class Watcher:
    """Looks at the account all the time, each time in one step, and remembers what was wrong."""

    def __init__(self, url: str) -> None:
        self.looks = 0
        self.most_held_us = 0
        self.wrong: list[list[str]] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        account = f"user/{USER}"
        keys = (redis_keys.balance(account), redis_keys.hold_amounts(account), redis_keys.holds(account))
        with client(self._url) as server:
            while not self._stop.wait(0.005):
                held, total, sessions, expiries = cast("list[str]", server.eval(SNAPSHOT, 3, *keys))
                self.looks += 1
                self.most_held_us = max(self.most_held_us, int(held))
                if held != total or int(held) < 0 or sessions != expiries:
                    self.wrong.append([held, total, sessions, expiries])


@contextmanager
def asking(url: str, kind: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ready to ask, a thousand sessions in all."""
    with ExitStack() as stack:
        started = []
        for number in range(PROCESSES):
            options = [url, f"p{number}", str(SESSIONS // PROCESSES), "64", kind]
            argv = [sys.executable, "-m", "tests.support.admission_load", *options]
            child = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(child)
            stack.callback(child.kill)
            started.append(child)
        for child in started:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        yield started


def go(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()


def outcomes(children: list[subprocess.Popen[str]]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for child in children:
        assert child.stdout is not None
        counted += Counter(json.loads(child.stdout.readline()))
        assert child.wait() == 0
    return counted


@pytest.mark.parametrize("allowed", [1, 617])
def test_a_thousand_from_four_processes(valkey_url: str, server: redis.Redis, allowed: int) -> None:
    """256 connections, one account: exactly so many are admitted, each has its hold, the rest have none."""
    set_balance(server, USER, 10 * allowed - 9, 0)
    with asking(valkey_url, "keep") as children, Watcher(valkey_url) as watcher:
        go(children)
        said = outcomes(children)
    assert said == Counter(OK=allowed, AT_FLOOR=SESSIONS - allowed)
    assert len(holds(server, USER)) == allowed
    assert (watcher.most_held_us, watcher.wrong) == (10 * allowed, [])


def test_a_thousand_threads(valkey_url: str, server: redis.Redis) -> None:
    """Real threads that share one client, let go at once."""
    set_balance(server, USER, 10 * 400, 0)
    barrier = threading.Barrier(SESSIONS)
    said: list[Reason] = []
    with Scheduler(valkey_url, max_connections=128, deadline_s=120, attempt_s=120) as scheduler:

        def ask(number: int) -> None:
            barrier.wait()
            said.append(scheduler.admit(USER, f"s-{number}", HOLD).reason)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(SESSIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert Counter(said) == {Reason.OK: 400, Reason.AT_FLOOR: 600}
    assert sum(holds(server, USER).values()) == 10 * 400


def test_with_releases_expiries_and_charges_at_the_same_time(valkey_url: str, server: redis.Redis) -> None:
    """Settlement posts to the account meanwhile: no charge is lost, and what is held is what the holds say."""
    charges = 300
    book = RedisBalances(redis.Redis.from_url(valkey_url), epoch=1, outbox_max_entries=1_000_000)
    set_balance(server, USER, 5_000, 0)

    def charge() -> None:
        for number in range(charges):
            start_ms = 60_000 * number
            cell = CellPosting(f"room/r-1@{start_ms}", start_ms, 1, {f"user/{USER}": -3}, "v1")
            book.post([Emission("room/r-1", [cell], None, [])])

    settlement = threading.Thread(target=charge)
    with asking(valkey_url, "churn") as children, Watcher(valkey_url) as watcher:
        settlement.start()
        go(children)
        said = outcomes(children)
        settlement.join()
    assert said.keys() <= {"OK", "AT_FLOOR"}
    assert said.total() == SESSIONS
    assert (watcher.wrong, watcher.looks > 0, watcher.most_held_us > 0) == ([], True, True)
    # The last short hold ends within 30 ms of the server's clock.
    with Scheduler(valkey_url, deadline_s=60, attempt_s=60) as scheduler:
        while any(expiry <= _far_off(server) for expiry in _expiries(server)):
            scheduler.release(USER, "s-nobody")
    left = holds(server, USER)
    assert all(0 <= amount < 20 for amount in left.values())
    balance = server.hmget(redis_keys.balance(f"user/{USER}"), "balance_us", "seq", "held_us")
    assert balance == [str(5_000 - 3 * charges), str(1 + charges), str(sum(left.values()))]
    with Scheduler(valkey_url, deadline_s=60, attempt_s=60) as scheduler:
        for session in left:
            assert scheduler.release(USER, session).reason is Reason.OK
        assert scheduler.admit(USER, "s-last", Hold(0, 1_000)).held_us == 0


def _expiries(server: redis.Redis) -> list[int]:
    found = cast(
        "list[tuple[str, float]]", server.zrange(redis_keys.holds(f"user/{USER}"), 0, -1, withscores=True)
    )
    return [int(expiry) for _, expiry in found]


def _far_off(server: redis.Redis) -> int:
    seconds, _ = cast("tuple[int, int]", server.time())
    return (seconds + 600) * 1_000
