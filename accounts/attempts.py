"""How often something may be tried, counted in the database.

Why there and not in Redis: what a guess is checked against is in the database, so while it is away nothing can be
guessed either, and there is no moment in which the guard is away and the door is open. Every process of the
API counts in the same place, and a restart forgets nothing. It costs one small write a try, beside an argon2
hash.

A try is counted in a transaction of its own *before* the check, so that a thousand guesses at once count a
thousand, and a process killed in the middle has counted. One that turns out right is taken back.

Windows are fixed (they begin at multiples of their length), so at a boundary twice the limit fits into one length.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import delete, update
from sqlalchemy.dialects import postgresql, sqlite

from accounts.database import Database
from accounts.errors import Reason, Refused
from accounts.models import Attempts
from accounts.secrets import Secrets
from telemetry import metrics

MINUTE_MS = 60_000


@dataclass(frozen=True)
class Limit:
    """At most so many tries in a window."""

    count: int
    window_ms: int


class Guarded(StrEnum):
    """What is limited, and per what."""

    LOGIN_ACCOUNT_ADDRESS = "login, account and address"
    LOGIN_ACCOUNT = "login, account"
    LOGIN_ADDRESS = "login, address"
    REGISTER_ADDRESS = "register, address"
    REFRESH_ADDRESS = "refresh, address"
    NODE_TOKEN_NODE = "node token, node"
    NODE_TOKEN_ADDRESS = "node token, address"
    CODE_NODE = "code, node"
    CODE_ADDRESS = "code, address"
    CODE_OWNER = "code, owner"


DEFAULT_LIMITS: dict[Guarded, Limit] = {
    # One address that guesses one account is stopped early; many addresses that guess it, later: else anybody could
    # lock anybody else out with a handful of wrong passwords.
    Guarded.LOGIN_ACCOUNT_ADDRESS: Limit(10, 15 * MINUTE_MS),
    Guarded.LOGIN_ACCOUNT: Limit(100, 60 * MINUTE_MS),
    Guarded.LOGIN_ADDRESS: Limit(60, 15 * MINUTE_MS),
    Guarded.REGISTER_ADDRESS: Limit(20, 60 * MINUTE_MS),
    Guarded.REFRESH_ADDRESS: Limit(600, 15 * MINUTE_MS),
    Guarded.NODE_TOKEN_NODE: Limit(60, 15 * MINUTE_MS),
    Guarded.NODE_TOKEN_ADDRESS: Limit(300, 15 * MINUTE_MS),
    # 8.5e11 codes and a million users: about one guess in a million hits somebody. Whoever owns a node can
    # own many, so the owner is counted too.
    Guarded.CODE_NODE: Limit(10, 60 * MINUTE_MS),
    Guarded.CODE_OWNER: Limit(30, 24 * 60 * MINUTE_MS),
    Guarded.CODE_ADDRESS: Limit(30, 60 * MINUTE_MS),
}


@dataclass(frozen=True)
class Counted:
    """Tries that were counted, so that they can be taken back."""

    rows: tuple[tuple[str, int], ...]


class AttemptCounter:
    """Counts tries; shared by threads."""

    def __init__(self, database: Database, secrets: Secrets, limits: dict[Guarded, Limit]) -> None:
        self._database = database
        self._secrets = secrets
        self._limits = limits

    def count(self, tries: Sequence[tuple[Guarded, str]], now_ms: int) -> Counted:
        """Count one try under each of these keys. Raises Refused, TOO_MANY_ATTEMPTS, when one is over its limit."""
        rows = []
        over: tuple[Guarded, int] | None = None
        for guarded, who in tries:
            limit = self._limits[guarded]
            start_ms = now_ms - now_ms % limit.window_ms
            key = self._secrets.mac(f"attempts {guarded}", who)
            rows.append((key, start_ms, start_ms + limit.window_ms, guarded, limit.count))
        # In one order everywhere, so that two transactions on the same keys never wait for each other in a circle.
        rows.sort()
        with self._database.write() as session:
            statement = sqlite.insert if self._database.is_sqlite else postgresql.insert
            for key, start_ms, end_ms, guarded, most in rows:
                counted = session.execute(
                    statement(Attempts)
                    .values(key=key, window_start_ms=start_ms, count=1, expires_at_ms=end_ms)
                    .on_conflict_do_update(
                        index_elements=["key", "window_start_ms"], set_={"count": Attempts.count + 1}
                    )
                    .returning(Attempts.count)
                ).scalar_one()
                if counted > most:
                    over = (
                        max(over, (guarded, end_ms), key=lambda item: item[1]) if over else (guarded, end_ms)
                    )
        if over is not None:
            guarded, end_ms = over
            metrics.ACCOUNTS_LIMITED.labels(guarded.value).inc()
            raise Refused(
                Reason.TOO_MANY_ATTEMPTS,
                "too many attempts; try again later",
                retry_after_s=max(1, -(-(end_ms - now_ms) // 1000)),
            )
        return Counted(tuple((key, start_ms) for key, start_ms, *_ in rows))

    def take_back(self, counted: Counted) -> None:
        """These tries were right: they do not count."""
        with self._database.write() as session:
            for key, start_ms in counted.rows:
                session.execute(
                    update(Attempts)
                    .where(Attempts.key == key, Attempts.window_start_ms == start_ms, Attempts.count > 0)
                    .values(count=Attempts.count - 1)
                )

    def sweep(self, now_ms: int) -> int:
        """Forget windows that are over; how many. Called now and then by the service."""
        with self._database.write() as session:
            gone = session.execute(
                delete(Attempts)
                .where(Attempts.expires_at_ms < now_ms)
                .returning(Attempts.key)
                .execution_options(synchronize_session=False)
            ).all()
        return len(gone)


def address_key(address: str) -> str:
    """Who an address belongs to, as far as it tells: itself, or the /64 of an IPv6 address, which is one
    customer.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)
