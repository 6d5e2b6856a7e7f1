"""The outbox in Redis, from the side of its reader: trimming what is stored, setting aside what is foreign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis

from schemas.messages import OutboxMessage
from schemas.redis_keys import LEDGER_STREAM, UNREADABLE_STREAM
from sinks.balances import heals
from sinks.retrying import ignore_retry, retrying


class RedisOutbox:
    """Trims the stream behind what is stored: `retention_s` later, or at once what is stored beyond half of
    `max_entries`, so that the retention never fills the outbox by itself."""

    def __init__(
        self,
        client: redis.Redis,
        retention_s: int,
        max_entries: int,
        on_retry: Callable[[Exception], None] = ignore_retry,
    ) -> None:
        self._client = client
        self._retention_ms = retention_s * 1000
        self._max_entries = max_entries
        self._on_retry = on_retry

    def trim(self, stored_id: bytes) -> int:
        return retrying(lambda: self._trim_once(stored_id), heals=heals, on_retry=self._on_retry)

    def _trim_once(self, stored_id: bytes) -> int:
        client = self._client
        seconds, _ = client.time()
        entries = int(client.xlen(LEDGER_STREAM))
        expired = f"{seconds * 1000 - self._retention_ms}-0"
        keep_from = (
            stored_id.decode()
            if entries > self._max_entries // 2
            else min(stored_id.decode(), expired, key=_sort_key)
        )
        # MINID keeps the entry of that very id: the last one stored stays, which costs nothing.
        return entries - int(client.xtrim(LEDGER_STREAM, minid=keep_from, approximate=False))

    def set_aside(self, message: OutboxMessage, why: str) -> None:
        entry: dict[Any, Any] = {**message.fields, b"entry_id": message.entry_id, b"why": why.encode()}
        retrying(
            lambda: self._client.xadd(UNREADABLE_STREAM, entry, maxlen=100_000, approximate=True),
            heals=heals,
            on_retry=self._on_retry,
        )


def _sort_key(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
