"""The blocking and the asyncio client on a real server: the same answers, and the same when it is away."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import prometheus_client
import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest

from app.embedded import process, valkey
from clients.scheduler import (
    Admission,
    AdmitFromLastKnown,
    AsyncScheduler,
    Breaker,
    Hold,
    PrometheusObserver,
    Reason,
    Release,
    Scheduler,
    State,
    Swept,
)
from clients.scheduler.observer import METRICS
from schemas import redis_keys
from tests.support.admission import client as text_client
from tests.support.admission import holds, set_balance

HOLD = Hold.of_minutes(10, lasts_s=60)
FOR_EVER_S = 30.0
Result = TypeVar("Result")


class Client(Protocol):
    """What both clients can do, made blocking."""

    def admit(self, user: str, session: str, hold: Hold, *, deadline_s: float | None = None) -> Admission: ...

    def release(self, user: str, session: str) -> Release: ...

    def recover(self) -> list[Admission]: ...

    def sweep(self) -> Swept | None: ...

    def close(self) -> None: ...

    @property
    def breaker(self) -> Breaker: ...

    @property
    def pending(self) -> int: ...


class Blocking:
    """An AsyncScheduler with a loop of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()

        async def make() -> AsyncScheduler:
            return AsyncScheduler(url, **options)

        self._client = self._runner.run(make())

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(coroutine)

    def admit(self, user: str, session: str, hold: Hold, *, deadline_s: float | None = None) -> Admission:
        return self._run(self._client.admit(user, session, hold, deadline_s=deadline_s))

    def release(self, user: str, session: str) -> Release:
        return self._run(self._client.release(user, session))

    def recover(self) -> list[Admission]:
        return self._run(self._client.recover())

    def sweep(self) -> Swept | None:
        return self._run(self._client.sweep())

    def close(self) -> None:
        self._run(self._client.close())
        self._runner.close()

    @property
    def breaker(self) -> Breaker:
        return self._client.breaker

    @property
    def pending(self) -> int:
        return self._client.pending


Make = Callable[..., Client]


@pytest.fixture(params=[Scheduler, Blocking])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes clients of each kind in turn; all are closed after the test."""
    made: list[Client] = []

    def build(url: str, **options: Any) -> Client:
        # Nothing here tests how fast this machine is: unless a test is about time there is enough of it.
        made.append(request.param(url, **{"deadline_s": FOR_EVER_S, "attempt_s": FOR_EVER_S, **options}))
        return made[-1]

    yield build
    for each in made:
        each.close()


class OwnServer:
    """A Valkey that a test may stop, start and pause."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = process.free_port()
        self.url = f"redis://{process.LOOPBACK}:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._service = valkey.service(self.directory / "data", self.port)
        self.process = process.start(self._service, self.directory / "valkey.log")

    def stop(self) -> None:
        process.stop(self.process, self._service.stop_deadline_s)

    def wipe(self) -> None:
        shutil.rmtree(self.directory / "data")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[OwnServer]:
    """A server of the test's own, with epoch 1."""
    started = OwnServer(tmp_path)
    try:
        with text_client(started.url) as client:
            client.set(redis_keys.EPOCH, 1)
        yield started
    finally:
        started.stop()


def test_admit_renew_release(make: Make, valkey_url: str, server: redis.Redis) -> None:
    """What the answers say is what is stored; the script is loaded where it is not known."""
    set_balance(server, "u-1", 15 * 60_000_000, 0)
    scheduler = make(valkey_url)
    first = scheduler.admit("u-1", "s-1", HOLD)
    assert (first.admitted, first.reason) == (True, Reason.OK)
    assert (first.balance_us, first.held_us, first.floor_us) == (900_000_000, 600_000_000, 0)
    assert first.expires_at_ms == server.zscore(redis_keys.holds("user/u-1"), "s-1")
    server.script_flush()
    assert scheduler.admit("u-1", "s-2", HOLD)
    refused = scheduler.admit("u-1", "s-3", HOLD)
    assert (bool(refused), refused.reason, refused.held_us) == (False, Reason.AT_FLOOR, 1_200_000_000)
    assert scheduler.admit("u-1", "s-2", Hold(5, 1_000)).held_us == 600_000_005
    assert holds(server, "u-1") == {"s-1": 600_000_000, "s-2": 5}
    released = scheduler.release("u-1", "s-1")
    assert (released.released, released.reason, released.held_us) == (True, Reason.OK, 5)
    again = scheduler.release("u-1", "s-1")
    assert (bool(again), again.reason) == (True, Reason.NO_HOLD)
    assert scheduler.sweep() == Swept(0, False)
    assert holds(server, "u-1") == {"s-2": 5}


def test_without_an_epoch_nobody_is_admitted(make: Make, valkey_url: str, server: redis.Redis) -> None:
    """Not a user without an account either; and a Redis that lost its end is noticed by who saw it."""
    server.set(redis_keys.ENTRIES, 9)
    scheduler, other = make(valkey_url), make(valkey_url)
    assert scheduler.admit("u-1", "s-1", HOLD)
    server.set(redis_keys.ENTRIES, 8)
    lost = scheduler.admit("u-1", "s-2", HOLD)
    assert (lost.reason, lost.detail) == (Reason.NOT_READY, "epoch 1 with 8 entries, after epoch 1 with 9")
    assert other.admit("u-1", "s-3", HOLD), "who has seen nothing cannot know"
    server.delete(redis_keys.EPOCH)
    assert other.admit("u-1", "s-4", HOLD).reason is Reason.NOT_READY
    assert set(holds(server, "u-1")) == {"s-1", "s-3"}


def test_a_server_that_is_gone_and_comes_back(make: Make, own_server: OwnServer) -> None:
    """Refused meanwhile; idle connections that it closed cost nobody an answer."""
    scheduler = make(own_server.url, attempt_s=5.0)
    assert scheduler.admit("u-1", "s-1", HOLD)
    own_server.stop()
    away = scheduler.admit("u-1", "s-2", HOLD, deadline_s=0.2)
    assert (away.admitted, away.reason, away.degraded) == (False, Reason.AWAY, True)
    assert away.detail
    own_server.start()
    back = scheduler.admit("u-1", "s-2", HOLD)
    while not back:
        # The breaker may still be open.
        assert back.reason is Reason.AWAY
        time.sleep(0.05)
        back = scheduler.admit("u-1", "s-2", HOLD)
    assert back.held_us == 2 * HOLD.amount_us


def test_a_restart_is_not_noticed_by_the_next_call(own_server: OwnServer) -> None:
    """The connection that the server closed is replaced within the first attempt: there is not one failure."""
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    options = {"deadline_s": FOR_EVER_S, "attempt_s": FOR_EVER_S}
    with Scheduler(own_server.url, observer=observer, **options) as scheduler:
        assert scheduler.admit("u-1", "s-1", HOLD)
        own_server.stop()
        own_server.start()
        assert scheduler.admit("u-1", "s-2", HOLD)

    async def with_asyncio() -> None:
        other = AsyncScheduler(own_server.url, observer=observer, **options)
        async with other as scheduler:
            assert await scheduler.admit("u-1", "s-3", HOLD)
            own_server.stop()
            own_server.start()
            # A loop that has had a turn since knows that the connection is closed.
            await asyncio.sleep(0.01)
            assert await scheduler.admit("u-1", "s-4", HOLD)
            assert scheduler.breaker.state is State.CLOSED

    asyncio.run(with_asyncio())
    assert b"lingua_admission_failures_total{" not in generate_latest(registry)


def test_a_server_that_hangs_costs_no_more_than_the_deadline(make: Make, own_server: OwnServer) -> None:
    """A stopped process takes connections and never answers; afterwards nobody gets another's answer."""
    scheduler = make(
        own_server.url, deadline_s=0.3, attempt_s=0.1, breaker=Breaker(failures=1_000), max_connections=2
    )
    while not scheduler.admit("u-1", "s-1", HOLD):
        pass
    own_server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert scheduler.admit("u-1", "s-2", HOLD).reason is Reason.AWAY
        took_s = time.monotonic() - began
    finally:
        own_server.process.send_signal(signal.SIGCONT)
    # Against a call that waits for ever; how punctual this machine is, is not the question.
    assert took_s < 10
    for number in range(20):
        user = f"u-fresh-{number}"
        admission = scheduler.admit(user, "s-1", Hold(number + 1, 60_000), deadline_s=FOR_EVER_S)
        assert (admission.user, admission.held_us) == (user, number + 1)


@pytest.mark.parametrize(
    ("configure", "reason"),
    [
        (lambda server: server.execute_command("REPLICAOF", "127.0.0.1", "1"), Reason.AWAY),
        (lambda server: server.config_set("maxmemory", "1"), Reason.AWAY),
        (lambda server: server.config_set("requirepass", "secret"), Reason.NO_ACCESS),
        (lambda server: server.execute_command("ACL", "SETUSER", "default", "-evalsha"), Reason.NO_ACCESS),
    ],
    ids=["replica", "out of memory", "password", "no permission"],
)
def test_what_a_server_may_say(
    make: Make, own_server: OwnServer, configure: Callable[[redis.Redis], object], reason: Reason
) -> None:
    """A replica (which has no master) and one without memory are away; one that wants a password lets nobody in."""
    scheduler = make(own_server.url)
    assert scheduler.admit("u-1", "s-1", HOLD)
    with text_client(own_server.url) as server:
        configure(server)
    # What is tried again ends when the breaker opens.
    admission = make(own_server.url).admit("u-1", "s-2", HOLD)
    assert (admission.admitted, admission.reason) == (False, reason)


def test_a_server_that_cannot_is_left(make: Make, own_server: OwnServer) -> None:
    """After READONLY the next attempt connects anew: the name may lead to the new master by then."""
    scheduler = make(own_server.url, breaker=Breaker(failures=4))
    assert scheduler.admit("u-1", "s-1", HOLD)
    with text_client(own_server.url) as server:
        server.execute_command("REPLICAOF", "127.0.0.1", "1")
        before = server.info("stats")["total_connections_received"]
        assert scheduler.admit("u-1", "s-2", HOLD).reason is Reason.AWAY
        assert server.info("stats")["total_connections_received"] == before + 3


def test_a_password_and_a_database_from_the_url(make: Make, own_server: OwnServer) -> None:
    """Both are part of it, as redis' own clients take them."""
    with text_client(own_server.url) as server:
        server.execute_command("SELECT", 3)
        server.config_set("requirepass", "secret")
    url = f"redis://:secret@{process.LOOPBACK}:{own_server.port}/3"
    with text_client(url) as third:
        third.set(redis_keys.EPOCH, 1)
        assert make(url).admit("u-1", "s-1", HOLD)
        assert holds(third, "u-1") == {"s-1": HOLD.amount_us}


def test_from_the_last_balance_and_back(make: Make, own_server: OwnServer) -> None:
    """Redis goes, sessions come in up to the allowance; Redis is back, they are holds, or the caller hears it."""
    heard: list[Admission] = []
    registry = CollectorRegistry()
    scheduler = make(
        own_server.url,
        policy=AdmitFromLastKnown(max_us_per_user=2 * HOLD.amount_us, max_age_s=600),
        observer=PrometheusObserver(registry),
        on_recovered=heard.append,
        breaker=Breaker(failures=1, open_s=0.05),
    )
    with text_client(own_server.url) as server:
        set_balance(server, "u-1", 10 * HOLD.amount_us, 0)
        set_balance(server, "u-2", 10 * HOLD.amount_us, 0)
        for user in ("u-1", "u-2"):
            assert scheduler.admit(user, "s-known", Hold(0, 60_000))
    own_server.stop()

    def away(user: str, session: str) -> Reason:
        return scheduler.admit(user, session, HOLD).reason

    assert [away("u-1", f"s-{number}") for number in range(3)] == [
        Reason.LAST_KNOWN,
        Reason.LAST_KNOWN,
        Reason.ALLOWANCE_SPENT,
    ]
    assert [away("u-2", "s-1"), away("u-3", "s-1")] == [Reason.LAST_KNOWN, Reason.AWAY]
    assert scheduler.pending == 3
    own_server.start()
    with text_client(own_server.url) as server:
        set_balance(server, "u-2", 0, 0)
        until = time.monotonic() + 30
        while scheduler.pending:
            scheduler.recover()
            assert time.monotonic() < until
        assert holds(server, "u-1") == {"s-0": HOLD.amount_us, "s-1": HOLD.amount_us, "s-known": 0}
        assert holds(server, "u-2") == {"s-known": 0}
    outcomes = {(each.user, each.session): each.reason for each in heard}
    assert outcomes == {
        ("u-1", "s-0"): Reason.OK,
        ("u-1", "s-1"): Reason.OK,
        ("u-2", "s-1"): Reason.AT_FLOOR,
    }
    told = registry.get_sample_value
    assert told("lingua_admission_without_redis_us_total") == 3 * HOLD.amount_us
    assert told("lingua_admission_pending") == 0
    labels = {"operation": "admit", "reason": "LAST_KNOWN", "degraded": "true"}
    assert told("lingua_admission_calls_total", labels) == 3
    assert told("lingua_admission_failures_total", {"operation": "admit", "trouble": "connection"}) >= 1
    assert told("lingua_admission_seconds_count", {"operation": "recover"}) == 3


def test_a_redis_that_comes_back_empty_admits_nobody_as_if_all_had_nothing(
    make: Make, own_server: OwnServer
) -> None:
    """Who is far below the floor does not become one with the default floor and no debt."""
    scheduler = make(own_server.url)
    with text_client(own_server.url) as server:
        set_balance(server, "u-1", -19_000_000_000)
        assert scheduler.admit("u-1", "s-1", HOLD).reason is Reason.AT_FLOOR
    own_server.stop()
    own_server.wipe()
    own_server.start()
    assert scheduler.admit("u-1", "s-1", HOLD).reason is Reason.NOT_READY
    assert make(own_server.url).admit("u-1", "s-1", HOLD).reason is Reason.NOT_READY


def test_every_metric_is_declared_and_one_state_holds(valkey_url: str, server: redis.Redis) -> None:
    """What a registry shows is what METRICS says."""
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    assert {family.name for family in registry.collect()} == set(METRICS)
    with Scheduler(valkey_url, observer=observer) as scheduler:
        for _ in range(5):
            permit = scheduler.breaker.permit()
            assert permit is not None
            scheduler.breaker.failed(permit)
    states = {
        state: registry.get_sample_value("lingua_admission_breaker", {"state": state.value})
        for state in State
    }
    assert states == {State.CLOSED: 0, State.HALF_OPEN: 0, State.OPEN: 1}
    assert prometheus_client.REGISTRY is not registry


def test_more_threads_than_connections(valkey_url: str, server: redis.Redis) -> None:
    """They wait for each other, and never open more connections than were allowed."""
    before = len(server.client_list())
    with Scheduler(valkey_url, max_connections=3, deadline_s=FOR_EVER_S, attempt_s=FOR_EVER_S) as scheduler:
        most = 0

        def ask(number: int) -> None:
            for turn in range(20):
                assert scheduler.admit(f"u-{number}", f"s-{turn}", Hold(1, 60_000))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(server.client_list()) - before)
        assert 1 <= most <= 3
    assert all(len(holds(server, f"u-{number}")) == 20 for number in range(12))


def test_all_connections_taken_is_not_an_outage(valkey_url: str, server: redis.Redis) -> None:
    """A call that found none in time is refused; the breaker stays closed."""
    hanging = socket.create_server(("127.0.0.1", 0))
    with hanging:
        url = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
        scheduler = Scheduler(
            url, max_connections=1, deadline_s=FOR_EVER_S, attempt_s=FOR_EVER_S, breaker=Breaker(failures=2)
        )
        slow = threading.Thread(target=scheduler.admit, args=("u-1", "s-1", HOLD))
        slow.start()
        connection, _ = hanging.accept()
        refused = scheduler.admit("u-1", "s-2", HOLD, deadline_s=0.5)
        assert (refused.reason, "were taken" in refused.detail) == (Reason.AWAY, True)
        assert scheduler.breaker.state is State.CLOSED
        hanging.close()
        connection.close()
        slow.join()
        scheduler.close()


def test_a_cancelled_call_leaves_a_usable_client(valkey_url: str, server: redis.Redis) -> None:
    """Its connection goes with it, so that its answer is nobody else's."""

    async def scenario() -> list[int | None]:
        options = {"deadline_s": FOR_EVER_S, "attempt_s": FOR_EVER_S, "max_connections": 2}
        async with AsyncScheduler(valkey_url, **options) as scheduler:
            for number in range(50):
                task = asyncio.create_task(scheduler.admit("u-1", f"s-{number}", Hold(1, 60_000)))
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            return [(await scheduler.admit(f"u-{n}", "s-1", Hold(n, 60_000))).held_us for n in range(10, 20)]

    assert asyncio.run(scenario()) == list(range(10, 20))


def test_a_fork_gets_connections_of_its_own(valkey_url: str, server: redis.Redis) -> None:
    """Parent and child share no socket, so neither reads the other's answers."""
    scheduler = Scheduler(valkey_url, deadline_s=FOR_EVER_S, attempt_s=FOR_EVER_S)
    assert scheduler.admit("u-1", "s-parent", HOLD)
    child = os.fork()
    if child == 0:
        good = all(scheduler.admit("u-2", f"s-{n}", Hold(1, 60_000)).held_us == n + 1 for n in range(50))
        os._exit(0 if good else 1)
    mine = [scheduler.admit("u-3", f"s-{n}", Hold(2, 60_000)).held_us for n in range(50)]
    assert os.waitpid(child, 0)[1] == 0
    assert mine == [2 * (n + 1) for n in range(50)]
    scheduler.close()


def test_the_folder_can_be_copied(tmp_path: Path, valkey_url: str, server: redis.Redis) -> None:
    """Under another name, in another place, without prometheus-client and without the rest of this project."""
    source = Path(__file__).resolve().parents[2] / "clients" / "scheduler"
    shutil.copytree(source, tmp_path / "admission", ignore=shutil.ignore_patterns("__pycache__"))
    program = f"""
import sys
sys.modules["prometheus_client"] = None
from admission import Hold, Scheduler
with Scheduler({valkey_url!r}, deadline_s=30, attempt_s=30) as scheduler:
    print(scheduler.admit("u-1", "s-1", Hold.of_minutes(10, lasts_s=60)).reason)
ours = [name for name in sys.modules if name.split(".")[0] in ("clients", "schemas", "telemetry", "metering")]
assert not ours, ours
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("OK\n", 0), done.stderr
