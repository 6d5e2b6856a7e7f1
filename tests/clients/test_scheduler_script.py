"""The script of admission on a real server: against a model, at its edges, and beside a rebuild."""

from __future__ import annotations

import time
from typing import cast

import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from clients.scheduler import SCRIPT
from clients.scheduler import admission as limits
from clients.scheduler.logic import USER_PREFIX
from metering.money import US_PER_MINUTE, user_account
from metering.rebuild import AccountState
from schemas import redis_keys
from sinks.balances import RedisBalances
from sinks.balances_rebuild import RedisEmptyBook
from tests.support.admission import MAX_HOLDS, ModelAccount, held_us, holds, set_balance

DAY_MS = 86_400_000
LARGEST_US = 999_999_999_999_999_999


def run(server: redis.Redis, *arguments: object) -> list[str]:
    return cast("list[str]", server.eval(SCRIPT, 0, *[str(argument) for argument in arguments]))


def admit(server: redis.Redis, user: str, session: str, amount_us: int, lasts_ms: int = DAY_MS) -> str:
    return run(server, "admit", f"user/{user}", session, amount_us, lasts_ms, 0, 0)[0]


def let_pass(server: redis.Redis, ms: int) -> None:
    """As if so much time had passed: every expiry comes nearer. The server's own clock cannot be set."""
    for key in [*server.scan_iter(f"{redis_keys.HOLDS_PREFIX}*"), redis_keys.HOLDS_EXPIRING]:
        for member, score in cast("list[tuple[str, float]]", server.zrange(key, 0, -1, withscores=True)):
            server.zadd(key, {member: int(score) - ms})


USERS = st.sampled_from(["u-1", "u-2", "u-3"])
SESSIONS = st.sampled_from(["s-1", "s-2", "s-3", "s-4"])
AMOUNTS = st.one_of(st.integers(0, 5), st.just(1_000_000_000_000), st.integers(0, 10**12))
LASTS_MIN = st.integers(1, 5)
BALANCES = st.one_of(
    st.integers(-10, 10),
    st.sampled_from([LARGEST_US, -LARGEST_US, 10**15, -(10**15), 2**53, 2**53 + 1]),
    st.integers(-LARGEST_US, LARGEST_US),
)
NEAR = st.integers(-3, 3)


class AgainstTheModel(RuleBasedStateMachine):
    """Any order of admissions, releases, sweeps, charges, other floors and passing time.

    Time passes in whole minutes and holds last half a minute more, so that the test's own time changes nothing.
    """

    server: redis.Redis

    @initialize()
    def begin(self) -> None:
        self.server.flushall()
        self.server.set(redis_keys.EPOCH, 1)
        self.model: dict[str, ModelAccount] = {}
        self.now_ms = 0

    def account(self, user: str) -> ModelAccount:
        return self.model.setdefault(user, ModelAccount())

    @rule(user=USERS, session=SESSIONS, amount_us=AMOUNTS, lasts_min=LASTS_MIN)
    def admit(self, user: str, session: str, amount_us: int, lasts_min: int) -> None:
        account, lasts_ms = self.account(user), lasts_min * 60_000 + 30_000
        said = run(self.server, "admit", f"user/{user}", session, amount_us, lasts_ms, 1, 0)
        assert said[0] == account.admit(session, amount_us, lasts_ms, self.now_ms)
        assert [int(text) for text in said[3:6]] == [account.balance_us, account.held_us, account.floor_us]
        self.collected_by_the_way(user)

    def collected_by_the_way(self, user: str) -> None:
        for other, account in self.model.items():
            # At most two others: with three users that is all of them.
            if other != user:
                account.collect(self.now_ms)

    @rule(user=USERS, session=SESSIONS)
    def release(self, user: str, session: str) -> None:
        account = self.account(user)
        said = run(self.server, "release", f"user/{user}", session)
        assert said == [account.release(session, self.now_ms), str(account.held_us)]

    @rule()
    def sweep(self) -> None:
        collected = sum(account.collect(self.now_ms) for account in self.model.values())
        assert run(self.server, "sweep", 1000) == [str(collected), "DONE"]

    @rule(minutes=st.integers(1, 4))
    def pass_time(self, minutes: int) -> None:
        self.now_ms += minutes * 60_000
        let_pass(self.server, minutes * 60_000)

    @rule(user=USERS, balance_us=BALANCES)
    def charge(self, user: str, balance_us: int) -> None:
        account = self.account(user)
        account.balance_us = balance_us
        set_balance(self.server, user, balance_us, account.floor_us)

    @rule(user=USERS, near=NEAR)
    def charge_to_the_edge(self, user: str, near: int) -> None:
        account = self.account(user)
        self.charge(user, account.floor_us + account.held_us + near)

    @rule(user=USERS, floor_us=BALANCES)
    def change_floor(self, user: str, floor_us: int) -> None:
        account = self.account(user)
        account.floor_us = floor_us
        set_balance(self.server, user, account.balance_us, floor_us)

    @invariant()
    def everything_agrees(self) -> None:
        for user, account in getattr(self, "model", {}).items():
            assert holds(self.server, user) == {s: amount for s, (amount, _) in account.holds.items()}


def test_the_script_does_what_the_model_does(server: redis.Redis) -> None:
    """Answers, balances and everything that is stored, after any sequence of steps."""

    class Machine(AgainstTheModel):
        pass

    Machine.server = server
    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(
    ("balance_us", "floor_us", "amount_us", "admitted"),
    [
        (1, 0, 10, 1),
        (0, 0, 10, 0),
        (10, 0, 10, 1),
        (11, 0, 10, 2),
        (-18_000_000_000 + 31, -18_000_000_000, 10, 4),
        (LARGEST_US, LARGEST_US - 21, 10, 3),
        (-LARGEST_US + 20, -LARGEST_US, 10, 2),
        (2**53 + 1, 2**53, 10, 1),
        (-(2**53), -(2**53) - 1, 10, 1),
        (10**9, 10**9 - 1, 1, 1),
        (-(10**9), -(10**9) - 1, 1, 1),
    ],
)
def test_the_edge_is_exact(
    server: redis.Redis, balance_us: int, floor_us: int, amount_us: int, admitted: int
) -> None:
    """So many sessions come in as the arithmetic says, one microsecond more or less decides; also beyond 2**53."""
    set_balance(server, "u-1", balance_us, floor_us)
    answers = [admit(server, "u-1", f"s-{number}", amount_us) for number in range(admitted + 1)]
    assert answers == ["OK"] * admitted + ["AT_FLOOR"]
    assert len(holds(server, "u-1")) == admitted


def test_an_account_without_a_key_has_nothing_and_the_default_floor(server: redis.Redis) -> None:
    """It is admitted down to -300 minutes, and its key goes again with its last hold."""
    amount_us = 100 * US_PER_MINUTE
    answers = [admit(server, "u-new", f"s-{number}", amount_us) for number in range(4)]
    assert answers == ["OK", "OK", "OK", "AT_FLOOR"]
    for number in range(3):
        assert run(server, "release", "user/u-new", f"s-{number}")[0] == "RELEASED"
    assert set(server.keys("*")) == {redis_keys.EPOCH}


def test_a_hold_is_dead_at_its_expiry(server: redis.Redis) -> None:
    """Not a millisecond later: what expires now does not count, what expires in an hour does."""
    set_balance(server, "u-1", 10, 0)
    assert admit(server, "u-1", "s-1", 10) == "OK"
    seconds, microseconds = cast("tuple[int, int]", server.time())
    now_ms = seconds * 1000 + microseconds // 1000
    for key, member in ((redis_keys.holds("user/u-1"), "s-1"), (redis_keys.HOLDS_EXPIRING, "user/u-1")):
        server.zadd(key, {member: now_ms + 3_600_000})
    assert admit(server, "u-1", "s-2", 10) == "AT_FLOOR"
    for key, member in ((redis_keys.holds("user/u-1"), "s-1"), (redis_keys.HOLDS_EXPIRING, "user/u-1")):
        server.zadd(key, {member: now_ms})
    assert admit(server, "u-1", "s-2", 10) == "OK"
    assert holds(server, "u-1") == {"s-2": 10}


def test_the_servers_clock_ends_a_hold(server: redis.Redis) -> None:
    """A hold of some milliseconds ends by itself."""
    set_balance(server, "u-1", 10, 0)
    assert admit(server, "u-1", "s-1", 10, lasts_ms=30) == "OK"
    began = time.monotonic()
    while admit(server, "u-1", "s-2", 10) != "OK":
        assert time.monotonic() - began < 10
    assert holds(server, "u-1") == {"s-2": 10}


def test_a_repeat_replaces(server: redis.Redis) -> None:
    """The same session again has one hold, the last one asked for; refused, it has none."""
    set_balance(server, "u-1", 100, 0)
    assert [admit(server, "u-1", "s-1", amount) for amount in (90, 90, 40)] == ["OK"] * 3
    assert holds(server, "u-1") == {"s-1": 40}
    set_balance(server, "u-1", 0, 0)
    assert admit(server, "u-1", "s-1", 40) == "AT_FLOOR"
    assert holds(server, "u-1") == {}
    assert run(server, "release", "user/u-1", "s-1") == ["NO_HOLD", "0"]


def test_the_number_of_holds_is_bounded(server: redis.Redis) -> None:
    """4096 fit, also of the largest amount and exactly; one more does not; all expire at once."""
    set_balance(server, "u-1", LARGEST_US, 0)
    pipeline = server.pipeline(transaction=False)
    for number in range(MAX_HOLDS + 1):
        pipeline.eval(SCRIPT, 0, "admit", "user/u-1", f"s-{number}", limits.MAX_HOLD_US, DAY_MS, 0, 0)
    answers = [reply[0] for reply in pipeline.execute()]
    assert answers == ["OK"] * MAX_HOLDS + ["TOO_MANY_HOLDS"]
    assert sum(holds(server, "u-1").values()) == MAX_HOLDS * limits.MAX_HOLD_US < 2**53
    assert admit(server, "u-1", "s-0", limits.MAX_HOLD_US) == "OK"
    let_pass(server, 2 * DAY_MS)
    assert admit(server, "u-1", "s-0", 1) == "OK"
    assert holds(server, "u-1") == {"s-0": 1}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("admit", "user/u-1", "s-1", "-1", 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", "1.5", 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", "1e3", 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", "0x10", 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", "", 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", limits.MAX_HOLD_US + 1, 1, 0, 0), "amount"),
        (("admit", "user/u-1", "s-1", 1, 0, 0, 0), "lasts"),
        (("admit", "user/u-1", "s-1", 1, limits.MAX_LASTS_MS + 1, 0, 0), "lasts"),
        (("admit", "user/u-1", "s-1", 1, 1, 0), "epoch"),
        (("admit", "user/u-1", "s/1", 1, 1, 0, 0), "session"),
        (("admit", "user/u-1", "/total", 1, 1, 0, 0), "session"),
        (("admit", "user/u-1", "s" * 129, 1, 1, 0, 0), "session"),
        (("admit", "user/u}1", "s-1", 1, 1, 0, 0), "account"),
        (("admit", "node/n-1", "s-1", 1, 1, 0, 0), "account"),
        (("admit", "user/", "s-1", 1, 1, 0, 0), "account"),
        (("release", "user/u-1"), "session"),
        (("look", "user/u-1", "s-1"), "operation"),
        (("sweep", "many"), "accounts"),
        ((), "account"),
    ],
)
def test_wrong_arguments_are_refused_with_nothing_done(
    server: redis.Redis, arguments: tuple[object, ...], error: str
) -> None:
    """The error says which one."""
    before = server.keys("*")
    with pytest.raises(redis.ResponseError, match=f"ARGUMENT {error}"):
        run(server, *arguments)
    assert server.keys("*") == before


def test_both_languages_have_the_same_limits() -> None:
    """What the client checks is what the script checks, and the account is what the pipeline charges."""
    assert f"MAX_HOLD_US, MAX_LASTS_MS, MAX_HOLDS = 1e12, {limits.MAX_LASTS_MS}, {MAX_HOLDS}" in SCRIPT
    assert limits.MAX_HOLD_US == 10**12
    assert f"'{redis_keys.DEFAULT_FLOOR_US}'" in SCRIPT
    assert limits.US_PER_MINUTE == US_PER_MINUTE
    assert user_account("u-1") == USER_PREFIX + "u-1"
    for key in (redis_keys.HOLDS_PREFIX, redis_keys.HOLD_AMOUNTS_PREFIX, redis_keys.BALANCE_PREFIX):
        assert f"'{key}{{'" in SCRIPT
    assert f"'{redis_keys.HOLDS_EXPIRING}'" in SCRIPT


@pytest.mark.parametrize(
    ("epoch", "entries", "seen", "ready"),
    [
        (None, None, (0, 0), False),
        (None, 7, (1, 7), False),
        (1, None, (0, 0), True),
        (1, 7, (0, 0), True),
        (1, 7, (1, 7), True),
        (1, 6, (1, 7), False),
        (1, None, (1, 7), False),
        (2, 3, (1, 7), True),
        (1, 9, (2, 3), False),
    ],
)
def test_an_empty_or_rolled_back_redis_admits_nobody(
    server: redis.Redis, epoch: int | None, entries: int | None, seen: tuple[int, int], ready: bool
) -> None:
    """Without an epoch, with an older one, or with fewer entries than were seen in it; a rebuilt one is newer."""
    server.flushall()
    for key, value in ((redis_keys.EPOCH, epoch), (redis_keys.ENTRIES, entries)):
        if value is not None:
            server.set(key, value)
    before = set(server.keys("*"))
    said = run(server, "admit", "user/u-1", "s-1", 10, DAY_MS, *seen)
    assert said[0] == ("OK" if ready else "NOT_READY")
    assert ready or set(server.keys("*")) == before


def test_every_admission_collects_from_two_other_accounts(server: redis.Redis) -> None:
    """So that `held_us` of users whom nobody asks about comes down; `sweep` says when there is more."""
    for number in range(5):
        assert admit(server, f"u-{number}", "s-1", 10, lasts_ms=60_000) == "OK"
    let_pass(server, 61_000)
    assert sum(held_us(server, f"u-{number}") for number in range(5)) == 50
    assert admit(server, "u-9", "s-1", 10) == "OK"
    assert sum(held_us(server, f"u-{number}") for number in range(5)) == 30
    assert run(server, "sweep", 2) == ["2", "MORE"]
    assert run(server, "sweep", 2) == ["1", "DONE"]
    assert run(server, "sweep", 2) == ["0", "DONE"]
    assert holds(server, "u-9") == {"s-1": 10}


def test_a_key_of_another_type_stops_it_before_it_writes(server: redis.Redis) -> None:
    """Also one of an account that would be collected by the way."""
    assert admit(server, "u-2", "s-1", 10, lasts_ms=60_000) == "OK"
    let_pass(server, 61_000)
    server.delete(redis_keys.hold_amounts("user/u-2"))
    server.set(redis_keys.hold_amounts("user/u-2"), "what")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        admit(server, "u-1", "s-1", 10)
    assert not server.exists(redis_keys.holds("user/u-1"), redis_keys.balance("user/u-1"))


@pytest.fixture
def book_server(valkey_url: str, server: redis.Redis) -> redis.Redis:
    """The rebuild's client gives bytes; so does this one."""
    return redis.Redis.from_url(valkey_url)


def test_holds_survive_a_rebuild_of_an_older_redis(server: redis.Redis, book_server: redis.Redis) -> None:
    """Of known accounts and of one that nothing was posted to; `held_us` is what the holds say."""
    set_balance(server, "u-1", 100, 0)
    set_balance(server, "u-void", 100, 0)
    assert admit(server, "u-1", "s-1", 40) == "OK"
    assert admit(server, "u-new", "s-1", 7) == "OK"
    rebuild = RebuildByHand(book_server)
    rebuild.begin()
    assert admit(server, "u-1", "s-during", 10) == "NOT_READY"
    assert run(server, "release", "user/u-1", "s-none") == ["NO_HOLD", "40"]
    assert rebuild.finish([AccountState("user/u-1", 90, 3, 0)]) == 1
    assert holds(server, "u-1") == {"s-1": 40}
    assert holds(server, "u-new") == {"s-1": 7}
    assert admit(server, "u-1", "s-2", 50) == "OK"
    assert admit(server, "u-1", "s-3", 50) == "AT_FLOOR"
    assert admit(server, "u-new", "s-2", 8) == "OK"
    assert holds(server, "u-new") == {"s-1": 7, "s-2": 8}


def test_after_a_rebuild_of_an_empty_redis_nothing_is_held(
    server: redis.Redis, book_server: redis.Redis
) -> None:
    """A release of a hold that went with the old Redis changes nothing, before and after."""
    assert admit(server, "u-1", "s-1", 40) == "OK"
    server.flushall()
    assert run(server, "release", "user/u-1", "s-1") == ["NO_HOLD", "0"]
    assert server.keys("*") == []
    rebuild = RebuildByHand(book_server)
    rebuild.begin()
    rebuild.finish([AccountState("user/u-1", 90, 3, 0)])
    assert run(server, "release", "user/u-1", "s-1") == ["NO_HOLD", "0"]
    assert holds(server, "u-1") == {}
    assert held_us(server, "u-1") == 0


class RebuildByHand:
    """What `rebuild-balances` does to Redis, in two halves."""

    def __init__(self, client: redis.Redis) -> None:
        self._book = RedisEmptyBook(client)
        self._epoch = 0

    def begin(self) -> None:
        self._epoch = self._book.newest_epoch() + 1
        self._book.remove_epoch()
        self._book.clear(self._epoch, 0)

    def finish(self, accounts: list[AccountState]) -> int:
        self._book.restore_accounts(accounts)
        forgotten = self._book.forget_accounts()
        self._book.announce(self._epoch)
        return forgotten


def test_a_first_posting_and_a_floor_keep_what_is_held(server: redis.Redis, book_server: redis.Redis) -> None:
    """The pipeline's scripts leave `held_us` alone, also where admission made the key."""
    assert admit(server, "u-1", "s-1", 40) == "OK"
    book = RedisBalances(book_server, epoch=1, outbox_max_entries=1_000)
    book.set_floor("user/u-1", -500)
    assert holds(server, "u-1") == {"s-1": 40}
    assert server.hmget(redis_keys.balance("user/u-1"), "balance_us", "floor_us") == ["0", "-500"]
