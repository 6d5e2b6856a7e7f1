"""Balances in Redis from below: written without the scripts, while a rebuild has made them refuse.

Whatever kills it in between leaves a Redis without an epoch, which every script refuses; the rebuild starts over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis.commands.core import Script

from metering.grants import Grants
from metering.rebuild import AccountState
from schemas import redis_keys
from schemas.records import RequestRecord
from sinks.balances import load_script, wrong_redis

KEYS_AT_ONCE = 5_000

Row = TypeVar("Row")


class RedisEmptyBook:
    """`metering.rebuild.EmptyBook` on Redis. Raises redis' errors and retries nothing.

    Many keys are written in one call, because each costs one wait for the disk.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._restore_accounts = load_script(client, "restore_accounts")
        self._restore_requests = load_script(client, "restore_requests")
        self._forget_accounts = load_script(client, "forget_accounts")
        self._coming = (0, "0@")
        """The epoch and the last entry of the last `clear`: another rebuild's Redis is refused."""

    def newest_epoch(self) -> int:
        known = self._client.mget(redis_keys.EPOCH, redis_keys.REBUILDING)
        return max(int(epoch or 0) for epoch in known)

    def last_window_ms(self) -> int | None:
        last: list[tuple[bytes, float]]
        last = self._client.zrevrange(redis_keys.LIVE_CELLS, 0, 0, withscores=True)  # type: ignore[assignment]
        return int(last[0][1]) if last else None

    def remove_epoch(self) -> None:
        self._client.delete(redis_keys.EPOCH, redis_keys.REBUILDING)

    def clear(self, epoch: int, entries: int) -> None:
        self._client.delete(
            redis_keys.LEDGER_STREAM,
            redis_keys.LIVE_CELLS,
            redis_keys.RESETTLE,
            redis_keys.LEDGER_STORED,
            redis_keys.LAST_ENTRY,
            redis_keys.REQUESTS,
            redis_keys.GRANTS,
            redis_keys.ALERTS_SENT,
        )
        for prefix in (redis_keys.CELL_PREFIX, redis_keys.REQUEST_PREFIX, redis_keys.REQUEST_MARK_PREFIX):
            for keys in self._keys(prefix):
                self._client.unlink(*keys)
        for keys in self._keys(redis_keys.BALANCE_PREFIX):
            pipeline = self._client.pipeline(transaction=True)
            for key in keys:
                pipeline.hdel(key, "balance_us", "seq")
            pipeline.execute()
        pipeline = self._client.pipeline(transaction=True)
        pipeline.set(redis_keys.ENTRIES, entries)
        pipeline.set(redis_keys.LEDGER_STORED, entries)
        pipeline.set(redis_keys.REBUILDING, epoch)
        pipeline.execute()
        self._coming = (epoch, f"{entries}@")

    def restore_accounts(self, accounts: Sequence[AccountState]) -> None:
        for some in batched(accounts):
            values: list[str | int] = []
            for account, balance_us, seq, floor_us, grants in some:
                floor = redis_keys.DEFAULT_FLOOR_US if floor_us is None else floor_us
                values += (account, balance_us, seq, floor, Grants(grants).text())
            self._run(self._restore_accounts, values)

    def restore_requests(self, requests: Sequence[RequestRecord]) -> None:
        for some in batched(requests):
            values: list[str | int] = []
            for r in some:
                values += (
                    r.request_id,
                    r.digest,
                    r.amount_us,
                    r.balance_us,
                    r.outcome,
                    r.posted_at_ms,
                    r.entry,
                )
            self._run(self._restore_requests, values)

    def forget_accounts(self) -> int:
        keys = self._keys(redis_keys.BALANCE_PREFIX)
        return sum(int(self._run(self._forget_accounts, some)[1]) for some in keys)

    def _run(self, script: Script, values: Sequence[str | int | bytes]) -> Any:
        try:
            return script(args=[*self._coming, *values])
        except redis.ResponseError as error:
            raise wrong_redis(error) from error

    def announce(self, epoch: int) -> None:
        # One step: at no moment is there neither, or both. A repeat after a lost answer finds it done.
        if self._client.get(redis_keys.EPOCH) != str(epoch).encode():
            self._client.rename(redis_keys.REBUILDING, redis_keys.EPOCH)

    def _keys(self, prefix: str) -> Iterator[list[bytes]]:
        found: list[bytes] = []
        for key in self._client.scan_iter(match=f"{prefix}*", count=KEYS_AT_ONCE):
            found.append(key)
            if len(found) >= KEYS_AT_ONCE:
                yield found
                found = []
        if found:
            yield found


def batched(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """In parts of as many keys as one call writes."""
    return (rows[first : first + KEYS_AT_ONCE] for first in range(0, len(rows), KEYS_AT_ONCE))
