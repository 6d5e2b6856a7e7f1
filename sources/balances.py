"""Balances in Redis, as write-offs read them: who is below zero, and what nodes have.

Blocks for as long as the client's time-outs and raises redis' errors; WrongRedis when there is no epoch: an empty
Redis, or one that is being rebuilt, knows nobody's debts.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis

from metering.money import USER_PREFIX, node_account
from metering.ports import WrongRedis
from schemas import redis_keys

KEYS_AT_ONCE = 5_000


class RedisCredit:
    """Reads many balances at a time."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def debts(self) -> dict[str, int]:
        """The balance (us) of every user who is below zero, by user id. Goes through all balances, some at a
        time."""
        self._check()
        found: dict[str, int] = {}
        prefix = f"{redis_keys.BALANCE_PREFIX}{{{USER_PREFIX}"
        keys: list[bytes] = []
        for key in self._client.scan_iter(match=f"{prefix}*", count=KEYS_AT_ONCE):
            keys.append(key)
            if len(keys) >= KEYS_AT_ONCE:
                found |= self._below_zero(keys, len(prefix))
                keys = []
        found |= self._below_zero(keys, len(prefix))
        self._check()
        return found

    def _below_zero(self, keys: Sequence[bytes], cut: int) -> dict[str, int]:
        balances = self._balances(keys)
        return {
            key[cut:-1].decode(): balance_us
            for key, balance_us in zip(keys, balances, strict=True)
            if balance_us < 0
        }

    def credits(self, node_ids: Sequence[str]) -> dict[str, int]:
        """Each node's balance (us)."""
        found: dict[str, int] = {}
        for first in range(0, len(node_ids), KEYS_AT_ONCE):
            some = node_ids[first : first + KEYS_AT_ONCE]
            keys = [redis_keys.balance(node_account(node_id)).encode() for node_id in some]
            found |= dict(zip(some, self._balances(keys), strict=True))
        self._check()
        return found

    def _balances(self, keys: Sequence[bytes]) -> list[int]:
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.hget(key, "balance_us")
        return [int(balance or 0) for balance in pipeline.execute()]

    def _check(self) -> None:
        if self._client.get(redis_keys.EPOCH) is None:
            raise WrongRedis("Redis has no epoch: it is empty or being rebuilt")
