"""Floors of single accounts, as the operator's tools set them."""

from __future__ import annotations

import redis

from app.books import current_epoch
from app.clients import redis_client
from app.errors import CommandError
from metering.ports import WrongRedis
from schemas.settings import Settings, one_line
from sinks.balances import RedisBalances


def set_floor(settings: Settings, account: str, floor_us: int) -> None:
    """Give an account a floor of its own, in Redis and, through the outbox, in the archive. Raises CommandError."""
    try:
        client = redis_client(settings)
        book = RedisBalances(client, current_epoch(settings, client), settings.outbox_max_entries)
        book.set_floor(account, floor_us)
    except WrongRedis as problem:
        raise CommandError(str(problem)) from problem
    except redis.RedisError as problem:
        raise CommandError(f"METERING_REDIS: {one_line(str(problem))}") from problem
