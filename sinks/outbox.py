"""The outbox in Redis, from the side of its reader: what is stored, and what is foreign and set aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import redis

from metering.ports import WrongRedis
from schemas.messages import OutboxMessage
from schemas.redis_keys import ENTRIES, UNREADABLE_STREAM
from sinks.balances import heals, load_script, wrong_redis
from sinks.retrying import retrying
from telemetry.quiet import ignore_retry


class RedisOutbox:
    """Notes in Redis what is stored and trims the stream behind it: `retention_s` later, or at once what is
    stored beyond half of `max_entries`."""

    def __init__(
        self,
        client: redis.Redis,
        epoch: int,
        retention_s: int,
        max_entries: int,
        on_retry: Callable[[Exception], None] = ignore_retry,
    ) -> None:
        self._client = client
        self._note_stored = load_script(client, "note_stored")
        self._condemn = load_script(client, "condemn")
        self._epoch = str(epoch)
        self._retention_ms = str(retention_s * 1000)
        self._max_entries = str(max_entries)
        self._on_retry = on_retry

    def note_stored(self, last: OutboxMessage, number: int) -> int:
        arguments: list[str | bytes] = [
            self._epoch,
            f"{number}@",
            last.entry_id,
            self._retention_ms,
            self._max_entries,
        ]
        try:
            left = retrying(lambda: self._note_stored(args=arguments), heals=heals, on_retry=self._on_retry)
        except redis.ResponseError as error:
            raise wrong_redis(error) from None
        return int(left)

    def check_reached(self, number: int) -> None:
        """Make sure that the outbox has had an entry of this number; notes nothing, since not all of that entry may
        be stored. Raises WrongRedis; then Redis lost its end, and no script of anybody runs until it is rebuilt."""
        had = retrying(lambda: self._client.get(ENTRIES), heals=heals, on_retry=self._on_retry)
        entries = int(had or 0)
        if entries < number:
            self.condemn(f"the outbox has {entries} entries, the ledger {number}")

    def condemn(self, why: str) -> NoReturn:
        """Remove the epoch, so that no script of anybody runs until Redis is rebuilt, and raise WrongRedis.
        Nothing is removed when a rebuild has set another epoch meanwhile."""
        retrying(lambda: self._condemn(args=[self._epoch]), heals=heals, on_retry=self._on_retry)
        raise WrongRedis(f"Redis lost its end ({why}): run `metering rebuild-balances`")

    def set_aside(self, message: OutboxMessage, why: str) -> None:
        entry: dict[Any, Any] = {**message.fields, b"entry_id": message.entry_id, b"why": why.encode()}
        retrying(
            lambda: self._client.xadd(UNREADABLE_STREAM, entry, maxlen=100_000, approximate=True),
            heals=heals,
            on_retry=self._on_retry,
        )
