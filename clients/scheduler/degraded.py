"""What may be admitted while Redis is away, and what has to be told to it afterwards.

Laws:
- Only a user is admitted of whom Redis told a balance, at most `max_age_s` ago, and for whom balance - held - what
  was admitted meanwhile is above the floor.
- All that is admitted of one user until Redis tells a new balance is at most `max_us_per_user`, whatever ends or
  expires in between: who has ended has used something that nobody could charge yet. To admit the same session again
  counts again. A hold of 0 says nothing of how much, so it is refused.
- Each is remembered as a grant. When Redis is back, a grant that has neither ended nor expired becomes a hold, for
  the time that is left of it; the same user's before anything else is admitted of that user.
- A release that could not be told is remembered, and told later. If it is forgotten, its hold expires.
- Everything is bounded: users, grants, grants of a user, releases. Past a bound users are forgotten (and refused),
  grants refused, the oldest release forgotten.

All this lives in one process and ends with it: sessions that were admitted without Redis then run without a hold,
and several schedulers admit up to `max_us_per_user` each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from .admission import Hold, Reason


@dataclass(frozen=True, slots=True)
class Deny:
    """While Redis is away nobody is admitted."""


@dataclass(frozen=True, slots=True)
class AdmitFromLastKnown:
    """While Redis is away users are admitted from the last balance that Redis told. Raises ValueError."""

    max_us_per_user: int
    """The most that is admitted of one user until Redis tells a new balance."""
    max_age_s: float
    """How old the last balance may be."""
    max_users: int = 100_000
    """Of how many users the last balance is kept: the last ones that were asked about."""
    max_grants: int = 10_000
    """How many sessions may be admitted without Redis at a time."""

    def __post_init__(self) -> None:
        for name in ("max_us_per_user", "max_age_s", "max_users", "max_grants"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: it is above zero")


Policy = Deny | AdmitFromLastKnown

MAX_GRANTS_PER_USER = 16
"""All of them are told to Redis before the user's next admission, so they must fit into one call's time."""

MAX_RELEASES = 10_000

Key = tuple[str, str]
"""User and session."""


@dataclass(slots=True)
class Known:
    """What Redis told last about a user, and what was admitted since."""

    balance_us: int
    held_us: int
    floor_us: int
    asked_at: float
    spent_us: int = 0
    granted_at: float = 0.0


@dataclass(slots=True, eq=False)
class Grant:
    """A session that was admitted without Redis."""

    user: str
    session: str
    amount_us: int
    expires_at: float
    told_by: int = 0
    """How many callers are telling it to Redis at this moment."""
    told: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policy says: LAST_KNOWN is yes."""

    reason: Reason
    known: Known | None = None
    detail: str = ""


@dataclass(slots=True)
class Memory:
    """The policy with its memory. Safe for threads; times are seconds of one monotonic clock."""

    policy: Policy
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _users: OrderedDict[str, Known] = field(default_factory=OrderedDict)
    _grants: dict[Key, Grant] = field(default_factory=dict)
    _of_user: dict[str, dict[str, Grant]] = field(default_factory=dict)
    _releases: OrderedDict[Key, None] = field(default_factory=OrderedDict)

    @property
    def pending(self) -> int:
        """Grants and releases that Redis was not told of yet."""
        return len(self._grants) + len(self._releases)

    def learn(self, user: str, balance_us: int, held_us: int, floor_us: int, asked_at: float) -> None:
        """Redis told a balance, to a question of that time."""
        if isinstance(self.policy, Deny):
            return
        with self._lock:
            known = self._users.get(user)
            fresh = Known(balance_us, held_us, floor_us, asked_at)
            of_user = self._of_user.get(user, {}).values()
            fresh.spent_us = sum(grant.amount_us for grant in of_user if not (grant.told or grant.ended))
            if known is not None:
                if known.asked_at > asked_at:
                    return
                if known.granted_at > asked_at:
                    # Asked before Redis went away, answered after something was admitted without it.
                    fresh.spent_us, fresh.granted_at = known.spent_us, known.granted_at
            self._users[user] = fresh
            self._users.move_to_end(user)
            if len(self._users) > self.policy.max_users:
                self._users.popitem(last=False)

    def judge(self, user: str, session: str, hold: Hold, why: Reason, now: float) -> Judgement:
        """Whether the session may run, now that Redis cannot be asked (`why`: AWAY or NOT_READY)."""
        policy = self.policy
        if isinstance(policy, Deny):
            return Judgement(why)
        with self._lock:
            known = self._users.get(user)
            if known is None:
                return Judgement(why, detail="nothing is known of the user")
            refusal = self._refusal(policy, known, user, session, hold, why, now)
            if refusal is not None:
                return refusal
            known.spent_us += hold.amount_us
            known.granted_at = now
            grant = Grant(user, session, hold.amount_us, now + hold.lasts_ms / 1_000)
            self._grants[user, session] = grant
            self._of_user.setdefault(user, {})[session] = grant
            return Judgement(Reason.LAST_KNOWN, known)

    def _refusal(
        self,
        policy: AdmitFromLastKnown,
        known: Known,
        user: str,
        session: str,
        hold: Hold,
        why: Reason,
        now: float,
    ) -> Judgement | None:
        free_us = known.balance_us - known.held_us - known.spent_us - known.floor_us
        of_user = self._of_user.get(user, {})
        is_new = session not in of_user
        spent = Reason.ALLOWANCE_SPENT
        rules = (
            (now - known.asked_at > policy.max_age_s, why, "the last known balance is too old"),
            (free_us <= 0, Reason.AT_FLOOR, ""),
            (hold.amount_us == 0, why, "without a hold there is no bound"),
            (known.spent_us + hold.amount_us > policy.max_us_per_user, spent, "the user's allowance"),
            (is_new and len(of_user) >= MAX_GRANTS_PER_USER, spent, "the user's number of sessions"),
            (is_new and len(self._grants) >= policy.max_grants, spent, "the number of sessions"),
        )
        return next((Judgement(reason, known, detail) for broken, reason, detail in rules if broken), None)

    def wanted(self, user: str, session: str) -> None:
        """The session is asked for again: a release of it that was not told must not be told after that."""
        if self._releases:
            with self._lock:
                self._releases.pop((user, session), None)

    def ended(self, user: str, session: str) -> None:
        """The session is being released."""
        if self._grants:
            with self._lock:
                grant = self._grants.get((user, session))
                if grant is not None:
                    # Whoever is telling it to Redis at this moment takes it back; see `told`.
                    grant.ended = True
                    if not grant.told_by:
                        self._forget(grant)

    def release_later(self, user: str, session: str) -> None:
        """Redis could not be told that the session ended."""
        with self._lock:
            self._releases[user, session] = None
            if len(self._releases) > MAX_RELEASES:
                self._releases.popitem(last=False)

    def take_grants(self, user: str | None, most: int, now: float) -> list[Grant]:
        """Grants to tell to Redis, of this user or of anybody; hand each back with `told` or `untold`."""
        if not self._grants:
            return []
        with self._lock:
            some = list((self._grants if user is None else self._of_user.get(user, {})).values())
            taken: list[Grant] = []
            for grant in some:
                if grant.expires_at <= now and not grant.told_by:
                    self._forget(grant)
                elif not grant.ended and not grant.told and len(taken) < most:
                    grant.told_by += 1
                    taken.append(grant)
            return taken

    def told(self, grant: Grant) -> bool:
        """Redis was told; true when the session ended meanwhile, so that it has to be released again."""
        with self._lock:
            grant.told_by -= 1
            grant.told = True
            known = self._users.get(grant.user)
            if known is not None and known.asked_at >= known.granted_at:
                # The balance is a new one, and so is what was admitted beside it: what is not among its holds yet.
                of_user = self._of_user.get(grant.user, {}).values()
                known.spent_us = sum(other.amount_us for other in of_user if not (other.told or other.ended))
            if not grant.told_by:
                self._forget(grant)
            return grant.ended

    def untold(self, grant: Grant) -> None:
        """Redis could not be told."""
        with self._lock:
            grant.told_by -= 1
            if (grant.told or grant.ended) and not grant.told_by:
                self._forget(grant)

    def take_releases(self, most: int) -> list[Key]:
        """Releases to tell to Redis, the oldest first; whoever fails remembers them again."""
        if not self._releases:
            return []
        with self._lock:
            return [self._releases.popitem(last=False)[0] for _ in range(min(most, len(self._releases)))]

    def _forget(self, grant: Grant) -> None:
        key = (grant.user, grant.session)
        # A newer grant of the same session stays.
        if self._grants.get(key) is grant:
            del self._grants[key]
            of_user = self._of_user[grant.user]
            del of_user[grant.session]
            if not of_user:
                del self._of_user[grant.user]
