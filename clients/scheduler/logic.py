"""Admission without I/O: what to send, when to try again, and what to answer when Redis is away.

Each operation is a generator that yields what it wants done (`Evaluate`, `Pause`) and is sent what came of it;
`Scheduler` does it with sockets and threads, `AsyncScheduler` with asyncio.

Laws:
- Only calls are tried again that may be made twice: the script's operations all are (see lua/holds.lua). An attempt
  that timed out may still arrive later than its repeat; what it then leaves at most is a hold that expires.
- No call takes longer than its deadline. An attempt has `attempt_s` of it, so that there is time for another.
- Away is: no connection, no answer in time, and an answer that will pass by itself (LOADING, READONLY, MASTERDOWN,
  CLUSTERDOWN, TRYAGAIN, NOREPLICAS, MISCONF, OOM, BUSY, too many clients). It is tried again, counts for the
  circuit breaker, and then the policy decides (`degraded.py`).
- Not ready (no epoch, or one that is older than what was seen) is an answer: it is not tried again, and the breaker
  stays closed. The policy decides, because what Redis told last is worth more than what an empty one says now.
- No access (NOAUTH, WRONGPASS, NOPERM, DENIED) is a refusal; the policy is not asked. It is a mistake in the
  configuration, and admitting from memory would hide it.
- Any other error of the server is raised: this is not a server, or not a script, that the client was made for.
- A call of which all connections are taken has waited for nothing that Redis did: it is answered like away, but the
  breaker does not count it.
- After every answered call up to two things that Redis was not told of yet are told, within the same deadline.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from redis import exceptions

from .admission import Admission, Hold, Reason, Release, Swept, check_id
from .breaker import Breaker
from .degraded import MAX_GRANTS_PER_USER, Deny, Grant, Memory, Policy
from .observer import Observer

USER_PREFIX = "user/"
FIRST_PAUSE_S = 0.01
LEAST_ATTEMPT_S = 0.002
"""With less time left no attempt is begun."""
RECOVERED_BY_A_CALL = 2

_PASSING = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "MISCONF",
    "OOM",
    "BUSY",
)


class Trouble(StrEnum):
    """Why an attempt failed."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    SERVER = "server"
    """The server answered that it cannot now."""
    SATURATED = "saturated"
    """All connections of this client were taken."""
    BREAKER = "breaker"
    """Not tried: the circuit breaker is open."""
    NO_ACCESS = "no_access"


class Saturated(Exception):
    """All connections of this client were taken for the whole time that there was."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Run the script with these arguments; the answer is its reply as strings, or redis' errors or Saturated."""

    arguments: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Sleep."""

    seconds: float


Result = TypeVar("Result")
Reply = list[str]
Steps = Generator[Evaluate | Pause, Reply, Result]


class Away(Exception):
    """Redis cannot be asked within the deadline."""

    def __init__(self, trouble: Trouble, detail: str) -> None:
        super().__init__(detail)
        self.trouble = trouble


class NoAccess(Exception):
    """Redis does not let this client in."""


class NotReady(Exception):
    """Redis does not know the balances."""


def trouble_of(error: Exception) -> Trouble | None:
    """What kind of failure an error of redis is; None when it is none of those that are expected."""
    text = str(error)
    if isinstance(
        error, (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    ) or text.startswith(("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")):
        return Trouble.NO_ACCESS
    if isinstance(error, (exceptions.TimeoutError, TimeoutError)):
        return Trouble.TIMEOUT
    if isinstance(
        error,
        (
            exceptions.BusyLoadingError,
            exceptions.ReadOnlyError,
            exceptions.OutOfMemoryError,
            exceptions.ClusterDownError,
            exceptions.MasterDownError,
            exceptions.TryAgainError,
        ),
    ) or text.startswith(_PASSING):
        return Trouble.SERVER
    if isinstance(error, (exceptions.ConnectionError, OSError)):
        return Trouble.CONNECTION
    return None


def ignore(admission: Admission) -> None:
    """The default for `on_recovered`."""


class Logic:
    """Everything about admission but the I/O. Safe for threads; times are seconds of `clock`."""

    def __init__(
        self,
        *,
        deadline_s: float,
        attempt_s: float,
        policy: Policy | None,
        breaker: Breaker | None,
        observer: Observer | None,
        on_recovered: Callable[[Admission], None],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < attempt_s <= deadline_s:
            raise ValueError(f"attempt_s={attempt_s}, deadline_s={deadline_s}: 0 < attempt_s <= deadline_s")
        self._deadline_s = deadline_s
        self._attempt_s = attempt_s
        self._observer = observer or Observer()
        self.breaker = breaker or Breaker(on_change=self._observer.breaker)
        self.memory = Memory(policy or Deny())
        self._on_recovered = on_recovered
        self._clock = clock
        self._wall_clock = wall_clock
        self._jitter = jitter
        self._seen = (0, 0)
        """The newest epoch that Redis told, and the most entries of its outbox in it."""
        self._lock = threading.Lock()

    def admit(self, user: str, session: str, hold: Hold, deadline_s: float | None) -> Steps[Admission]:
        check_id("user", user)
        check_id("session", session)
        started = self._clock()
        give_up_at = started + (self._deadline_s if deadline_s is None else deadline_s)
        self.memory.wanted(user, session)
        answered = False
        try:
            yield from self._tell_grants(user, MAX_GRANTS_PER_USER, give_up_at)
            admission = yield from self._place("admit", user, session, hold, give_up_at)
            answered = True
        except NoAccess as error:
            admission = Admission(user, session, False, Reason.NO_ACCESS, degraded=True, detail=str(error))
        except (Away, NotReady) as error:
            why = Reason.AWAY if isinstance(error, Away) else Reason.NOT_READY
            admission = self._judge(user, session, hold, why, str(error))
        if answered and self.memory.pending:
            yield from self._catch_up(give_up_at)
        self._observer.called("admit", admission.reason, admission.degraded, self._clock() - started)
        return admission

    def release(self, user: str, session: str, deadline_s: float | None) -> Steps[Release]:
        check_id("user", user)
        check_id("session", session)
        started = self._clock()
        give_up_at = started + (self._deadline_s if deadline_s is None else deadline_s)
        # First: whoever tells this session's grant to Redis right now has to learn that it ended.
        self.memory.ended(user, session)
        answered = False
        try:
            release = yield from self._release(user, session, give_up_at)
            answered = True
        except (Away, NoAccess) as error:
            self.memory.release_later(user, session)
            reason = Reason.AWAY if isinstance(error, Away) else Reason.NO_ACCESS
            release = Release(user, session, False, reason, detail=str(error))
            self._observer.pending(self.memory.pending)
        if answered and self.memory.pending:
            yield from self._catch_up(give_up_at)
        self._observer.called("release", release.reason, not answered, self._clock() - started)
        return release

    def sweep(self, accounts: int, deadline_s: float | None) -> Steps[Swept | None]:
        """None when Redis is away."""
        started = self._clock()
        give_up_at = started + (self._deadline_s if deadline_s is None else deadline_s)
        swept = None
        reason = Reason.OK
        try:
            collected, more = yield from self._call("sweep", ("sweep", str(accounts)), give_up_at)
            swept = Swept(int(collected), more == "MORE")
        except (Away, NoAccess) as error:
            reason = Reason.AWAY if isinstance(error, Away) else Reason.NO_ACCESS
        self._observer.called("sweep", reason, swept is None, self._clock() - started)
        return swept

    def recover(self, most: int, deadline_s: float | None) -> Steps[list[Admission]]:
        """What became of grants that Redis was told of now; stops where Redis is away."""
        give_up_at = self._clock() + (self._deadline_s if deadline_s is None else deadline_s)
        recovered: list[Admission] = []
        try:
            recovered += yield from self._tell_grants(None, most, give_up_at)
            yield from self._tell_releases(most, give_up_at)
        except (Away, NoAccess, NotReady):
            # What was not told stays pending.
            pass
        return recovered

    # Steps ------------------------------------------------------------------------------------------------

    def _place(
        self, operation: str, user: str, session: str, hold: Hold, give_up_at: float
    ) -> Steps[Admission]:
        asked_at = self._clock()
        seen = self._seen
        numbers = (hold.amount_us, hold.lasts_ms, *seen)
        arguments = ("admit", USER_PREFIX + user, session, *map(str, numbers))
        reply = yield from self._call(operation, arguments, give_up_at)
        answer = Reason(reply[0])
        epoch, entries, balance_us, held_us, floor_us, expires_at_ms = map(int, reply[1:])
        if answer is Reason.NOT_READY:
            raise NotReady(f"epoch {epoch} with {entries} entries, after epoch {seen[0]} with {seen[1]}")
        with self._lock:
            self._seen = max(self._seen, (epoch, entries))
        self.memory.learn(user, balance_us, held_us, floor_us, asked_at)
        admitted = answer is Reason.OK
        return Admission(
            user,
            session,
            admitted,
            answer,
            balance_us,
            held_us,
            floor_us,
            expires_at_ms if admitted else None,
        )

    def _release(self, user: str, session: str, give_up_at: float) -> Steps[Release]:
        answer, held_us = yield from self._call(
            "release", ("release", USER_PREFIX + user, session), give_up_at
        )
        reason = Reason.OK if answer == "RELEASED" else Reason.NO_HOLD
        return Release(user, session, True, reason, int(held_us))

    def _judge(self, user: str, session: str, hold: Hold, why: Reason, detail: str) -> Admission:
        judged = self.memory.judge(user, session, hold, why, self._clock())
        known = judged.known
        admitted = judged.reason is Reason.LAST_KNOWN
        if admitted:
            self._observer.admitted_without_redis(hold.amount_us)
            self._observer.pending(self.memory.pending)
        return Admission(
            user,
            session,
            admitted,
            judged.reason,
            balance_us=known.balance_us if known else None,
            held_us=known.held_us + known.spent_us if known else None,
            floor_us=known.floor_us if known else None,
            expires_at_ms=int(self._wall_clock() * 1_000) + hold.lasts_ms if admitted else None,
            degraded=True,
            detail=": ".join(text for text in (judged.detail, detail) if text),
        )

    def _catch_up(self, give_up_at: float) -> Steps[None]:
        try:
            yield from self._tell_grants(None, RECOVERED_BY_A_CALL, give_up_at)
            yield from self._tell_releases(RECOVERED_BY_A_CALL, give_up_at)
        except (Away, NoAccess, NotReady):
            # The call itself has its answer; what was not told stays pending.
            pass

    def _tell_grants(self, user: str | None, most: int, give_up_at: float) -> Steps[list[Admission]]:
        """Make holds of grants; raises Away, NoAccess or NotReady, and leaves what is not told."""
        taken = self.memory.take_grants(user, most, self._clock())
        if not taken:
            return []
        recovered = []
        try:
            while taken:
                admission = yield from self._tell(taken[-1], give_up_at)
                ended = self.memory.told(taken.pop())
                if ended:
                    yield from self._take_back(admission, give_up_at)
                else:
                    recovered.append(admission)
                    self._on_recovered(admission)
        finally:
            for grant in taken:
                self.memory.untold(grant)
            self._observer.pending(self.memory.pending)
        return recovered

    def _tell(self, grant: Grant, give_up_at: float) -> Steps[Admission]:
        started = self._clock()
        left_ms = max(1, int((grant.expires_at - started) * 1_000))
        hold = Hold(grant.amount_us, left_ms)
        admission = yield from self._place("recover", grant.user, grant.session, hold, give_up_at)
        self._observer.called("recover", admission.reason, False, self._clock() - started)
        return admission

    def _take_back(self, admission: Admission, give_up_at: float) -> Steps[None]:
        """The session ended while its grant was being told; its own release may have come before the hold."""
        try:
            yield from self._release(admission.user, admission.session, give_up_at)
        except (Away, NoAccess):
            self.memory.release_later(admission.user, admission.session)
            raise

    def _tell_releases(self, most: int, give_up_at: float) -> Steps[None]:
        keys = self.memory.take_releases(most)
        told = bool(keys)
        try:
            while keys:
                yield from self._release(*keys[-1], give_up_at)
                keys.pop()
        finally:
            for key in keys:
                self.memory.release_later(*key)
            if told:
                self._observer.pending(self.memory.pending)

    def _call(self, operation: str, arguments: tuple[str, ...], give_up_at: float) -> Steps[Reply]:
        """The script's reply. Raises Away, NoAccess, or redis' error when it is none that is expected."""
        pause_s = FIRST_PAUSE_S
        last = Away(Trouble.TIMEOUT, "the deadline is over")
        while (left_s := give_up_at - self._clock()) >= LEAST_ATTEMPT_S:
            permit = self.breaker.permit()
            if permit is None:
                self._observer.failed(operation, Trouble.BREAKER)
                raise (
                    last if pause_s > FIRST_PAUSE_S else Away(Trouble.BREAKER, "the circuit breaker is open")
                )
            try:
                reply = yield Evaluate(arguments, min(left_s, self._attempt_s))
            except Saturated as error:
                self.breaker.abandoned(permit)
                self._observer.failed(operation, Trouble.SATURATED)
                raise Away(Trouble.SATURATED, str(error)) from None
            except (exceptions.RedisError, OSError) as error:
                found = trouble_of(error)
                if found is None or found is Trouble.NO_ACCESS:
                    self.breaker.succeeded(permit)
                    if found is None:
                        raise
                    self._observer.failed(operation, found)
                    raise NoAccess(str(error)) from None
                self.breaker.failed(permit)
                self._observer.failed(operation, found)
                last = Away(found, str(error))
            except BaseException:
                self.breaker.abandoned(permit)
                raise
            else:
                self.breaker.succeeded(permit)
                return reply
            nap_s = pause_s * (0.5 + 0.5 * self._jitter())
            if self._clock() + nap_s + LEAST_ATTEMPT_S > give_up_at:
                break
            yield Pause(nap_s)
            pause_s *= 2
        raise last
