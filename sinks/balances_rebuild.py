"""Balances in Redis from below: written without the scripts, while a rebuild has made them refuse.

Whatever kills it in between leaves a Redis without an epoch, which every script refuses; the rebuild starts over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import redis

from metering.rebuild import AccountState
from schemas import redis_keys
from schemas.records import RequestRecord

KEYS_AT_ONCE = 5_000


class RedisEmptyBook:
    """`metering.rebuild.EmptyBook` on Redis. Raises redis' errors and retries nothing.

    Writes come in transactions, because each costs one wait for the disk.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

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
            redis_keys.LEDGER_STREAM, redis_keys.LIVE_CELLS, redis_keys.RESETTLE, redis_keys.LEDGER_STORED
        )
        for prefix in (redis_keys.CELL_PREFIX, redis_keys.REQUEST_PREFIX):
            for keys in self._keys(prefix):
                self._client.unlink(*keys)
        pipeline = self._client.pipeline(transaction=True)
        pipeline.set(redis_keys.ENTRIES, entries)
        pipeline.set(redis_keys.LEDGER_STORED, entries)
        pipeline.set(redis_keys.REBUILDING, epoch)
        pipeline.execute()

    def restore_accounts(self, accounts: Sequence[AccountState]) -> None:
        seconds, microseconds = self._client.time()
        at_ms = seconds * 1000 + microseconds // 1000
        for first in range(0, len(accounts), KEYS_AT_ONCE):
            pipeline = self._client.pipeline(transaction=True)
            for account, balance_us, seq, floor_us in accounts[first : first + KEYS_AT_ONCE]:
                key = redis_keys.balance(account)
                pipeline.hset(
                    key,
                    items=[
                        "balance_us",
                        balance_us,
                        "seq",
                        seq,
                        "updated_at_ms",
                        at_ms,
                        "floor_us",
                        redis_keys.DEFAULT_FLOOR_US if floor_us is None else floor_us,
                    ],
                )
                # Of an older Redis the sessions that it admitted go on, and so do their holds.
                pipeline.hsetnx(key, "held_us", "0")
            pipeline.execute()

    def restore_requests(self, requests: Sequence[RequestRecord]) -> None:
        for first in range(0, len(requests), KEYS_AT_ONCE):
            pipeline = self._client.pipeline(transaction=True)
            for request in requests[first : first + KEYS_AT_ONCE]:
                pipeline.hset(
                    redis_keys.request(request.request_id),
                    mapping={
                        "digest": request.digest,
                        "amount_us": request.amount_us,
                        "balance_us": request.balance_us,
                        "outcome": request.outcome,
                        "at_ms": request.posted_at_ms,
                    },
                )
            pipeline.execute()

    def accounts(self) -> Iterator[list[str]]:
        cut = len(redis_keys.BALANCE_PREFIX) + 1
        for keys in self._keys(redis_keys.BALANCE_PREFIX):
            yield [key.decode("utf-8", "backslashreplace")[cut:-1] for key in keys]

    def forget_accounts(self, accounts: Sequence[str]) -> None:
        if accounts:
            self._client.unlink(*(redis_keys.balance(account) for account in accounts))

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
