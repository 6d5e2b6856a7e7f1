"""A Valkey for tests of admission, what its hold keys say, and a model of what they must say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import redis

from app.embedded import process, valkey
from schemas import redis_keys
from tests.support.services import running_service

MAX_HOLDS = 4096


@contextmanager
def running_valkey(directory: Path, port: int | None = None) -> Iterator[str]:
    """A server of one's own with its data in `directory`; yields its URL."""
    service = valkey.service(directory, port or process.free_port())
    with running_service(service, directory.parent / f"{directory.name}.log"):
        yield f"redis://{process.LOOPBACK}:{service.port}/0"


def client(url: str) -> redis.Redis:
    """Gives text."""
    return redis.Redis.from_url(url, decode_responses=True)


def set_balance(server: redis.Redis, user: str, balance_us: int, floor_us: int | None = None) -> None:
    """As a posting leaves it."""
    values: dict[str, str | int] = {"balance_us": balance_us, "seq": 1, "updated_at_ms": 1}
    floor = redis_keys.DEFAULT_FLOOR_US if floor_us is None else floor_us
    server.hset(redis_keys.balance(f"user/{user}"), mapping={**values, "floor_us": floor})


def held_us(server: redis.Redis, user: str) -> int:
    """What readers of the balance see."""
    return int(cast("str | None", server.hget(redis_keys.balance(f"user/{user}"), "held_us")) or 0)


def holds(server: redis.Redis, user: str) -> dict[str, int]:
    """What each session holds; asserts that everything written about holds of this user says the same."""
    account = f"user/{user}"
    amounts = cast("dict[str, str]", server.hgetall(redis_keys.hold_amounts(account)))
    total = int(amounts.pop("/total", "0"))
    expiries = dict(
        cast("list[tuple[str, float]]", server.zrange(redis_keys.holds(account), 0, -1, withscores=True))
    )
    found = {session: int(amount) for session, amount in amounts.items()}
    assert set(found) == set(expiries)
    assert total == sum(found.values()) == held_us(server, user)
    first = min(expiries.values(), default=None)
    assert server.zscore(redis_keys.HOLDS_EXPIRING, account) == first
    return found


@dataclass
class ModelAccount:
    """An account as the script must see it; expiries in ms of the model's clock."""

    balance_us: int = 0
    floor_us: int = redis_keys.DEFAULT_FLOOR_US
    holds: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def held_us(self) -> int:
        return sum(amount for amount, _ in self.holds.values())

    def collect(self, now_ms: int) -> int:
        expired = [session for session, (_, expiry) in self.holds.items() if expiry <= now_ms]
        for session in expired:
            del self.holds[session]
        return len(expired)

    def admit(self, session: str, amount_us: int, lasts_ms: int, now_ms: int) -> str:
        self.collect(now_ms)
        self.holds.pop(session, None)
        if self.balance_us - self.held_us <= self.floor_us:
            return "AT_FLOOR"
        if len(self.holds) >= MAX_HOLDS:
            return "TOO_MANY_HOLDS"
        self.holds[session] = (amount_us, now_ms + lasts_ms)
        return "OK"

    def release(self, session: str, now_ms: int) -> str:
        self.collect(now_ms)
        return "RELEASED" if self.holds.pop(session, None) else "NO_HOLD"
