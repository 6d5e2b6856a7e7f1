"""What the admission client does with answers, errors and time, on a server that is a list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from redis import exceptions

from clients.scheduler import Admission, AdmitFromLastKnown, Breaker, Deny, Hold, Policy, Reason, State
from clients.scheduler.degraded import MAX_GRANTS_PER_USER, MAX_RELEASES
from clients.scheduler.logic import Evaluate, Logic, Saturated, Steps, Trouble, trouble_of
from clients.scheduler.observer import Observer

HOLD = Hold(10, 60_000)
REFUSED = exceptions.ConnectionError("Connection refused")
Result = TypeVar("Result")
Answer = list[str] | Exception
Server = Callable[[tuple[str, ...]], Answer]


def placed(balance_us: int = 100, held_us: int = 10, answer: str = "OK", epoch: int = 1) -> list[str]:
    return [answer, str(epoch), "5", str(balance_us), str(held_us), "0", "1234"]


NOT_READY = ["NOT_READY", "0", "0", "0", "0", "0", "0"]


@dataclass
class Heard(Observer):
    """Remembers what it hears."""

    calls: list[tuple[str, str, bool]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    without_redis_us: int = 0
    left: int = 0

    def called(self, operation: str, reason: str, degraded: bool, seconds: float) -> None:
        self.calls.append((operation, reason, degraded))

    def failed(self, operation: str, trouble: str) -> None:
        self.troubles.append(trouble)

    def breaker(self, state: State) -> None:
        self.states.append(state)

    def admitted_without_redis(self, amount_us: int) -> None:
        self.without_redis_us += amount_us

    def pending(self, count: int) -> None:
        self.left = count


class World:
    """The logic with a clock that only what is done moves."""

    def __init__(
        self, policy: Policy | None = None, failures: int = 5, attempt_takes_s: float = 0.001
    ) -> None:
        self.now = 1_000.0
        self.attempt_takes_s = attempt_takes_s
        self.heard = Heard()
        self.recovered: list[Admission] = []
        self.sent: list[tuple[str, ...]] = []
        self.naps: list[float] = []
        self.timeouts: list[float] = []
        self.server: Server = lambda arguments: placed()
        self.breaker = Breaker(
            failures=failures,
            open_s=1.0,
            clock=lambda: self.now,
            jitter=lambda: 1.0,
            on_change=self.heard.breaker,
        )
        self.logic = Logic(
            deadline_s=0.25,
            attempt_s=0.1,
            policy=policy,
            breaker=self.breaker,
            observer=self.heard,
            on_recovered=self.recovered.append,
            clock=lambda: self.now,
            wall_clock=lambda: 2_000.0,
            jitter=lambda: 1.0,
        )

    def answers(self, *answers: Answer) -> None:
        """The server gives these, one for each attempt, and then the last one for ever."""
        rest = list(answers)
        self.server = lambda arguments: rest.pop(0) if len(rest) > 1 else rest[0]

    def run(self, steps: Steps[Result]) -> Result:
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, Evaluate):
                    self.sent.append(wanted.arguments)
                    self.timeouts.append(wanted.timeout_s)
                    answer = self.server(wanted.arguments)
                    timed_out = isinstance(answer, exceptions.TimeoutError)
                    self.now += wanted.timeout_s if timed_out else self.attempt_takes_s
                    wanted = steps.throw(answer) if isinstance(answer, Exception) else steps.send(answer)
                else:
                    self.naps.append(wanted.seconds)
                    self.now += wanted.seconds
                    wanted = steps.send([])
        except StopIteration as stop:
            result: Result = stop.value
            return result

    def admit(self, user: str = "u-1", session: str = "s-1", hold: Hold = HOLD) -> Admission:
        return self.run(self.logic.admit(user, session, hold, None))

    def release(self, user: str = "u-1", session: str = "s-1") -> Reason:
        return self.run(self.logic.release(user, session, None)).reason

    def recover(self, most: int = 100) -> list[Admission]:
        return self.run(self.logic.recover(most, None))

    def until_the_breaker_lets_through(self) -> None:
        self.now += 1.0


def told(sent: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(arguments[0], arguments[2]) for arguments in sent]


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (exceptions.ConnectionError("refused"), Trouble.CONNECTION),
        (exceptions.ConnectionError("max number of clients reached"), Trouble.CONNECTION),
        (ConnectionResetError("reset"), Trouble.CONNECTION),
        (exceptions.TimeoutError("slow"), Trouble.TIMEOUT),
        (TimeoutError("slow"), Trouble.TIMEOUT),
        (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), Trouble.SERVER),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), Trouble.SERVER),
        (exceptions.MasterDownError("Link with MASTER is down"), Trouble.SERVER),
        (exceptions.ClusterDownError("The cluster is down"), Trouble.SERVER),
        (exceptions.TryAgainError("again"), Trouble.SERVER),
        (exceptions.OutOfMemoryError("command not allowed"), Trouble.SERVER),
        (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), Trouble.SERVER),
        (exceptions.ResponseError("NOREPLICAS Not enough good replicas"), Trouble.SERVER),
        (exceptions.ResponseError("BUSY Redis is busy running a script"), Trouble.SERVER),
        (exceptions.AuthenticationError("Authentication required."), Trouble.NO_ACCESS),
        (exceptions.NoPermissionError("this user has no permissions"), Trouble.NO_ACCESS),
        (exceptions.ResponseError("NOAUTH Authentication required."), Trouble.NO_ACCESS),
        (exceptions.ResponseError("WRONGTYPE Operation against a key"), None),
        (exceptions.ResponseError("ARGUMENT amount: 0 to 1e12 us"), None),
        (exceptions.ResponseError("unknown command 'EVALSHA'"), None),
    ],
)
def test_each_error_has_one_meaning(error: Exception, trouble: Trouble | None) -> None:
    """Away, no access, or something that must be seen."""
    assert trouble_of(error) is trouble


def test_what_passes_is_tried_again_with_growing_pauses() -> None:
    """The second of them is twice the first; then the answer counts."""
    world = World()
    world.answers(REFUSED, exceptions.BusyLoadingError("loading"), placed(balance_us=7))
    admission = world.admit()
    assert (admission.admitted, admission.reason, admission.balance_us) == (True, Reason.OK, 7)
    assert admission.degraded is False
    assert world.naps == [0.01, 0.02]
    assert world.heard.troubles == ["connection", "server"]
    assert len(set(world.sent)) == 1


def test_no_call_takes_longer_than_its_deadline() -> None:
    """Attempts that hang are cut, the last one to what is left; no nap is begun that would go past the end."""
    world = World(failures=100)
    world.answers(exceptions.TimeoutError("slow"))
    began = world.now
    assert world.admit().reason is Reason.AWAY
    assert world.now - began <= 0.25
    assert world.timeouts[:2] == [0.1, 0.1]
    assert 0 < world.timeouts[-1] < 0.1
    world.answers(REFUSED)
    began = world.now
    world.admit()
    assert world.now - began <= 0.25


def test_a_deadline_of_ones_own() -> None:
    """One that is over before it began attempts nothing."""
    world = World()
    assert world.run(world.logic.admit("u-1", "s-1", HOLD, 0.0)).reason is Reason.AWAY
    assert world.sent == []


@pytest.mark.parametrize("error", [exceptions.AuthenticationError("no"), exceptions.NoPermissionError("no")])
def test_no_access_is_a_refusal_at_once(error: Exception) -> None:
    """It is not tried again, the breaker stays closed, and no policy admits over it."""
    world = World(AdmitFromLastKnown(max_us_per_user=100, max_age_s=60), failures=1)
    world.admit()
    world.answers(error)
    admission = world.admit(session="s-2")
    assert (admission.admitted, admission.reason) == (False, Reason.NO_ACCESS)
    assert len(world.sent) == 2
    assert world.breaker.state is State.CLOSED
    assert world.release() is Reason.NO_ACCESS


def test_an_error_that_nobody_expects_is_raised() -> None:
    """A wrong type or a refused argument is no outage; and it stops nobody else."""
    world = World(failures=1)
    world.answers(exceptions.ResponseError("WRONGTYPE Operation against a key"))
    with pytest.raises(exceptions.ResponseError):
        world.admit()
    assert world.breaker.state is State.CLOSED


def test_too_few_connections_are_no_outage() -> None:
    """The call is answered like away, at once, and the breaker does not count it."""
    world = World(failures=1)
    world.answers(Saturated("all taken"))
    assert world.admit().reason is Reason.AWAY
    assert world.heard.troubles == ["saturated"]
    assert world.breaker.state is State.CLOSED


@pytest.mark.parametrize("name", ["", "a/b", "ü", "a" * 129, "a\n", None, 5])
def test_wrong_ids_are_refused(name: str) -> None:
    """Before anything is sent."""
    world = World()
    for steps in (world.logic.admit(name, "s", HOLD, None), world.logic.release("u", name, None)):
        with pytest.raises(ValueError, match="1 to 128 characters"):
            world.run(steps)
    assert world.sent == []


@pytest.mark.parametrize(
    ("amount_us", "lasts_ms"),
    [(-1, 1), (10**12 + 1, 1), (1.0, 1), (True, 1), ("1", 1), (1, 0), (1, 86_400_001), (1, 1.5)],
)
def test_wrong_holds_are_refused(amount_us: int, lasts_ms: int) -> None:
    """Both are bounded integers."""
    with pytest.raises(ValueError, match="it is an integer from"):
        Hold(amount_us, lasts_ms)


def test_the_newest_epoch_and_entries_are_sent_along() -> None:
    """A newer epoch counts its entries anew."""
    world = World()
    world.answers(placed(epoch=3))
    world.admit()
    world.answers(["OK", "4", "2", "0", "0", "0", "1"])
    world.admit()
    world.answers(placed(epoch=3))
    world.admit()
    world.admit()
    assert [arguments[-2:] for arguments in world.sent] == [("0", "0"), ("3", "5"), ("4", "2"), ("4", "2")]


# The circuit breaker ----------------------------------------------------------------------------------


def test_the_breaker_opens_probes_and_closes() -> None:
    """After five failures nobody waits; after a second one probe goes, and its success lets everybody through."""
    world = World()
    world.answers(REFUSED)
    world.admit()
    assert world.breaker.state is State.OPEN
    attempts = len(world.sent)
    began = world.now
    assert world.admit().reason is Reason.AWAY
    assert (len(world.sent), world.now) == (attempts, began)
    world.now += 0.999
    world.admit()
    assert len(world.sent) == attempts
    world.now += 0.001
    world.admit()
    assert len(world.sent) == attempts + 1, "the probe failed, so it opened again"
    world.until_the_breaker_lets_through()
    world.answers(placed())
    assert world.admit().admitted
    assert world.heard.states == [
        State.OPEN,
        State.HALF_OPEN,
        State.OPEN,
        State.HALF_OPEN,
        State.CLOSED,
    ]


def test_only_one_probe_goes_and_a_lost_one_is_replaced() -> None:
    """A probe whose task was cancelled makes way at once, one whose thread died after the time."""
    now = [0.0]
    breaker = Breaker(failures=1, open_s=1.0, clock=lambda: now[0], jitter=lambda: 1.0)
    first = breaker.permit()
    assert first is not None
    breaker.failed(first)
    now[0] = 1.0
    probe = breaker.permit()
    assert probe is not None
    assert breaker.permit() is None
    breaker.abandoned(probe)
    again = breaker.permit()
    assert again is not None
    assert breaker.permit() is None
    now[0] = 2.0
    third = breaker.permit()
    assert third is not None, "nothing was heard of the second probe"
    breaker.failed(first)
    breaker.succeeded(third)
    assert breaker.state is State.CLOSED
    late = breaker.permit()
    assert late is not None
    breaker.failed(probe)
    assert breaker.state is State.CLOSED, "what an old attempt reports changes nothing"


def test_successes_in_between_start_the_count_anew() -> None:
    """Only failures in a row open it."""
    breaker = Breaker(failures=2)
    for _ in range(5):
        for report in (breaker.failed, breaker.succeeded):
            permit = breaker.permit()
            assert permit is not None
            report(permit)
    assert breaker.state is State.CLOSED


def test_a_cancelled_call_gives_its_probe_back() -> None:
    """A generator that is closed in the middle of an attempt leaves no probe behind."""
    world = World(failures=1)
    world.answers(REFUSED)
    world.admit()
    world.until_the_breaker_lets_through()
    steps = world.logic.admit("u-1", "s-1", HOLD, None)
    assert isinstance(next(steps), Evaluate)
    steps.close()
    world.answers(placed())
    assert world.admit().admitted


# Without Redis ----------------------------------------------------------------------------------------


def policy(max_us_per_user: int = 30, max_age_s: float = 60, **bounds: int) -> AdmitFromLastKnown:
    return AdmitFromLastKnown(max_us_per_user=max_us_per_user, max_age_s=max_age_s, **bounds)


def without_redis(chosen: Policy, balance_us: int = 100, held_us: int = 10) -> World:
    """A world that knows u-1 and whose Redis has just gone."""
    world = World(chosen, failures=1)
    world.answers(placed(balance_us, held_us))
    world.admit(session="s-known")
    world.answers(REFUSED)
    return world


def test_deny_denies() -> None:
    """Whatever was known."""
    world = without_redis(Deny())
    admission = world.admit()
    assert (admission.admitted, admission.reason, admission.degraded) == (False, Reason.AWAY, True)


@pytest.mark.parametrize("max_us_per_user", [0, -1])
def test_a_policy_without_a_bound_is_refused(max_us_per_user: int) -> None:
    """It names what is wrong."""
    with pytest.raises(ValueError, match="max_us_per_user"):
        policy(max_us_per_user)


def test_up_to_the_allowance_from_the_last_balance() -> None:
    """30 us are three holds of 10, whatever was released in between; what it says tells how it came about."""
    world = without_redis(policy())
    first = world.admit(session="s-1")
    assert (first.admitted, first.reason, first.degraded) == (True, Reason.LAST_KNOWN, True)
    assert (first.balance_us, first.held_us, first.floor_us) == (100, 20, 0)
    assert first.expires_at_ms == 2_060_000
    assert world.release(session="s-1") is Reason.AWAY
    assert [world.admit(session=f"s-{number}").reason for number in (2, 3, 4)] == [
        Reason.LAST_KNOWN,
        Reason.LAST_KNOWN,
        Reason.ALLOWANCE_SPENT,
    ]
    assert world.heard.without_redis_us == 30


def test_to_admit_a_session_again_counts_again() -> None:
    """Who renews uses more."""
    world = without_redis(policy())
    assert [world.admit().admitted for _ in range(4)] == [True, True, True, False]
    assert world.logic.memory.pending == 1


def test_never_below_the_floor_as_it_was_known() -> None:
    """25 less 10 held is 15: one hold of 10, and with 5 left another one, and no more."""
    world = without_redis(policy(1_000), balance_us=25)
    assert [world.admit(session=f"s-{number}").reason for number in range(3)] == [
        Reason.LAST_KNOWN,
        Reason.LAST_KNOWN,
        Reason.AT_FLOOR,
    ]


def test_nobody_of_whom_nothing_is_known() -> None:
    """An unknown user, one that was forgotten for others, a balance that is too old, and a hold of nothing."""
    world = without_redis(policy(max_users=1))
    assert world.admit(user="u-2").reason is Reason.AWAY
    assert world.admit(hold=Hold(0, 1)).reason is Reason.AWAY
    world.now += 59
    assert world.admit().admitted
    world.now += 1.1
    old = world.admit(session="s-2")
    assert (old.reason, old.balance_us) == (Reason.AWAY, 100)
    assert "too old" in old.detail
    world.answers(placed())
    world.admit(user="u-2")
    world.answers(REFUSED)
    assert world.admit(user="u-1").reason is Reason.AWAY


def test_the_number_of_sessions_is_bounded() -> None:
    """Of a user, and in all."""
    world = without_redis(policy(10_000), balance_us=10_000)
    hold = Hold(1, 60_000)
    reasons = [
        world.admit(session=f"s-{number}", hold=hold).reason for number in range(MAX_GRANTS_PER_USER + 1)
    ]
    assert reasons == [Reason.LAST_KNOWN] * MAX_GRANTS_PER_USER + [Reason.ALLOWANCE_SPENT]
    world = without_redis(policy(10_000, max_grants=2))
    assert [world.admit(session=f"s-{number}").admitted for number in range(3)] == [True, True, False]


def test_a_redis_that_is_not_ready_is_asked_once_and_the_policy_decides() -> None:
    """The breaker stays closed, since an answer came."""
    world = without_redis(policy())
    world.answers(NOT_READY)
    before = len(world.sent)
    assert world.admit().reason is Reason.LAST_KNOWN
    assert world.admit(user="u-2").reason is Reason.NOT_READY
    assert len(world.sent) == before + 2
    assert world.breaker.state is State.CLOSED


def test_what_was_admitted_becomes_holds_before_the_user_gets_another() -> None:
    """For the time that is left; an expired one is dropped; then the allowance is whole again."""
    world = without_redis(policy())
    world.admit(session="s-1")
    world.admit(session="s-2", hold=Hold(10, 500))
    world.until_the_breaker_lets_through()
    world.sent.clear()
    world.answers(placed())
    assert world.admit(session="s-3").reason is Reason.OK
    assert told(world.sent) == [("admit", "s-1"), ("admit", "s-3")]
    left_ms = int(world.sent[0][4])
    assert 58_000 < left_ms < 59_100
    assert [admission.session for admission in world.recovered] == ["s-1"]
    assert world.heard.left == 0
    assert ("recover", "OK", False) in world.heard.calls
    world.answers(REFUSED)
    assert [world.admit(session=f"t-{number}").admitted for number in range(4)] == [True, True, True, False]


def test_what_redis_refuses_afterwards_is_told_to_the_scheduler() -> None:
    """The session that ran without a hold is at the floor: the caller hears it, once."""
    world = without_redis(policy())
    world.admit(session="s-1")
    world.until_the_breaker_lets_through()
    world.answers(placed(0, 0, answer="AT_FLOOR"))
    [refused] = world.recover()
    assert (refused.session, refused.admitted, refused.reason) == ("s-1", False, Reason.AT_FLOOR)
    assert world.recovered == [refused]
    assert world.recover() == []


def test_other_users_are_told_of_by_and_by() -> None:
    """Two with each answered call, and all of them by `recover`."""
    world = World(policy(), failures=1)
    for number in range(6):
        world.admit(user=f"u-{number}", session="s-known")
    world.answers(REFUSED)
    for number in range(6):
        world.admit(user=f"u-{number}")
    world.until_the_breaker_lets_through()
    world.answers(placed())
    world.sent.clear()
    world.admit(user="u-9")
    assert world.sent[0][1] == "user/u-9"
    assert (len(world.sent), world.heard.left) == (3, 4)
    assert len(world.recover()) == 4
    assert world.heard.left == 0


def test_a_partly_told_user_still_counts_what_is_untold() -> None:
    """Redis comes back for one call only: of two grants one is a hold, the other still counts."""
    world = without_redis(policy(20))
    world.admit(session="s-1")
    world.admit(session="s-2")
    world.until_the_breaker_lets_through()
    world.answers(placed(), REFUSED)
    assert len(world.recover()) == 0
    assert world.heard.left == 1
    assert [world.admit(session=f"t-{number}").reason for number in range(2)] == [
        Reason.LAST_KNOWN,
        Reason.ALLOWANCE_SPENT,
    ]


def test_releases_are_told_later_unless_the_session_is_asked_for_again() -> None:
    """A release after the session's new admission would take its hold away."""
    world = without_redis(policy())
    for session in ("s-1", "s-2"):
        assert world.release(session=session) is Reason.AWAY
    world.until_the_breaker_lets_through()
    world.sent.clear()
    world.server = lambda arguments: placed() if arguments[0] == "admit" else ["RELEASED", "0"]
    assert world.admit(session="s-1").admitted
    assert told(world.sent) == [("admit", "s-1"), ("release", "s-2")]
    assert world.heard.left == 0


def test_a_session_that_ends_while_it_is_told_is_released_again() -> None:
    """Another thread releases it between the hold's being sent and its answer."""
    world = without_redis(policy())
    world.admit(session="s-1")
    world.until_the_breaker_lets_through()
    world.sent.clear()

    def server(arguments: tuple[str, ...]) -> Answer:
        if arguments[0] == "admit":
            world.logic.memory.ended("u-1", "s-1")
            return placed()
        return ["RELEASED", "0"]

    world.server = server
    assert world.recover() == []
    assert told(world.sent) == [("admit", "s-1"), ("release", "s-1")]
    assert (world.recovered, world.heard.left) == ([], 0)


def test_a_session_that_ended_without_redis_is_not_told() -> None:
    """It would only stand in the way."""
    world = without_redis(policy())
    world.admit(session="s-1")
    world.release(session="s-1")
    world.until_the_breaker_lets_through()
    world.sent.clear()
    world.answers(["NO_HOLD", "0"])
    assert world.recover() == []
    assert told(world.sent) == [("release", "s-1")]


def test_two_threads_may_tell_the_same() -> None:
    """The second one's end does not bring back what the first has told, nor does its failure."""
    world = without_redis(policy())
    world.admit(session="s-1")
    memory = world.logic.memory
    [first] = memory.take_grants("u-1", 5, world.now)
    [second] = memory.take_grants(None, 5, world.now)
    assert first is second
    assert memory.told(first) is False
    assert memory.take_grants(None, 5, world.now) == []
    memory.untold(second)
    assert memory.pending == 0


def test_remembered_releases_are_bounded() -> None:
    """The oldest goes: its hold expires by itself."""
    world = World()
    for number in range(MAX_RELEASES + 5):
        world.logic.memory.release_later("u-1", f"s-{number}")
    assert world.logic.memory.pending == MAX_RELEASES
    assert world.logic.memory.take_releases(1) == [("u-1", "s-5")]


def test_an_answer_that_was_asked_for_before_forgets_nothing() -> None:
    """It comes after something was admitted without Redis, and must not give the allowance back."""
    world = without_redis(policy(10))
    asked_at = world.now
    world.now += 0.1
    assert world.admit(session="s-1").admitted
    world.logic.memory.ended("u-1", "s-1")
    world.logic.memory.learn("u-1", 100, 10, 0, asked_at)
    assert world.admit(session="s-2").reason is Reason.ALLOWANCE_SPENT
