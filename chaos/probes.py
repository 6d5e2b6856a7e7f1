"""Whether everything that was sent up to a moment has arrived: one event of a new user in each partition.

What lies before a probe in its partition was read before it. A probe is through when it is on its user's balance,
in the ledger and in the usage store.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import redis

from app.errors import CommandError
from app.views import query_rows
from chaos.load import Parcel, Sender
from chaos.world import World
from schemas import redis_keys
from schemas.rfc3339 import format_rfc3339_ms
from schemas.topics import EVENTS

ARCHIVE_EVERY_S = 0.15


@dataclass
class Probe:
    """Sent at `sent_at` (monotonic); the other times are None until it is seen there."""

    users: tuple[str, ...]
    sent_at: float
    on_balances_at: float | None = None
    in_archive_at: float | None = None
    _asked_at: float = field(default=0.0, repr=False)


class Prober:
    """Sends probes and looks for them."""

    def __init__(self, world: World, sender: Sender, name: str) -> None:
        self._world = world
        self._sender = sender
        self._name = name
        self._numbers = itertools.count(1)

    def send(self) -> Probe:
        """One event into each partition, now."""
        number = next(self._numbers)
        users = []
        for partition in range(self._world.settings.partitions):
            user = f"probe-{self._name}-{number}-{partition}"
            users.append(user)
            self._sender.send(Parcel(EVENTS, f"session/{user}".encode(), _message(user), partition))
        return Probe(tuple(users), time.monotonic())

    def through(self, probe: Probe) -> bool:
        """Look for it where it was not seen yet; never raises for a server that is away."""
        now = time.monotonic()
        if probe.on_balances_at is None and self._on_balances(probe):
            probe.on_balances_at = time.monotonic()
        if (
            probe.on_balances_at is not None
            and probe.in_archive_at is None
            and now - probe._asked_at > ARCHIVE_EVERY_S
        ):
            probe._asked_at = now
            if self._in_archive(probe):
                probe.in_archive_at = time.monotonic()
        return probe.in_archive_at is not None

    def _on_balances(self, probe: Probe) -> bool:
        pipeline = self._world.live.pipeline(transaction=False)
        for user in probe.users:
            pipeline.hget(redis_keys.balance(f"user/{user}"), "balance_us")
        try:
            return all(pipeline.execute())
        except redis.RedisError:
            return False

    def _in_archive(self, probe: Probe) -> bool:
        users = ", ".join(f"'{user}'" for user in probe.users)
        accounts = ", ".join(f"'user/{user}'" for user in probe.users)
        database = self._world.settings.clickhouse_database
        query = (
            f"SELECT (SELECT uniqExact(account) FROM `{database}`.ledger WHERE account IN ({accounts})), "
            f"(SELECT uniqExact(user_id) FROM `{database}`.usage_events WHERE user_id IN ({users}))"
        )
        try:
            [found] = query_rows(self._world.archive(), query, {})
        except CommandError:
            self._world.forget_archive()
            return False
        return found == (len(probe.users), len(probe.users))


def _message(user: str) -> bytes:
    time_text = format_rfc3339_ms(time.time_ns() // 1_000_000)
    return (
        f'{{"specversion":"1.0","id":"{user}","source":"node/probe","type":"lingua.usage.utterance.v1",'
        f'"time":"{time_text}","data":{{"session_id":"{user}","user_id":"{user}","node_id":"probe",'
        f'"utterance_id":"{user}","asr_time_ms":10,"nmt_time_ms":10,"tts_time_ms":10,"gpu_active_time_ms":20}}}}'
    ).encode()
