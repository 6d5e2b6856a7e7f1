"""Going on with another log: the topic was made anew, grew partitions, or lost what a flow had yet to read.

Whatever the old log said and was not settled cannot be read again, and revisions of the two logs do not
compare. So every window that may hold usage of the old one is frozen: what is settled there stays, and
`metering resettle` makes it whole from the usage store. Then the flows start at the head of the new log.

Run it while the flows are stopped. Order of effects: freeze, then claim the log, then move the recovery stores
aside. Killed in between, the flows still refuse to start, and running it again does the rest.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import redis
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from app.books import adopt_log, expected_epoch
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from metering.cells import WINDOW_MS
from metering.ports import WrongRedis
from schemas import redis_keys
from schemas.settings import Settings, one_line
from schemas.topics import EVENTS
from sinks.balances import RedisBalances
from sources.kafka import WrongLog, describe_log

RECOVERY = "recovery"
FLOWS_WITH_A_PLACE = ("settlement", "usage_store")


@dataclass(frozen=True)
class AdoptedLog:
    """What was done: windows before `frozen_before_ms` are frozen; `moved` are the stores put aside."""

    frozen_before_ms: int
    moved: list[Path]


def recovery_store(settings: Settings, flow: str) -> Path:
    """The directory of a flow's recovery store."""
    return settings.state_dir / RECOVERY / flow


def adopt_new_log(settings: Settings) -> AdoptedLog:
    """Freeze what the old log touched and make the flows read the topic that is there from its head.

    Raises CommandError, one line, when a server is away or is not the one that the books were kept on.
    """
    try:
        return _adopt(settings)
    except KafkaException as error:
        raise CommandError(f"METERING_KAFKA={settings.kafka}: {one_line(error.args[0].str())}") from error
    except redis.RedisError as error:
        raise CommandError(f"METERING_REDIS: {one_line(str(error))}") from error
    except (WrongLog, WrongRedis) as error:
        raise CommandError(str(error)) from error


def _adopt(settings: Settings) -> AdoptedLog:
    client = redis_client(settings)
    log = describe_log(AdminClient({"bootstrap.servers": settings.kafka}), EVENTS)
    book = RedisBalances(client, expected_epoch(settings, client), settings.outbox_max_entries)
    last_posted: list[tuple[bytes, float]]
    last_posted = client.zrevrange(redis_keys.LIVE_CELLS, 0, 0, withscores=True)  # type: ignore[assignment]
    windows = [int(score) for _, score in last_posted]
    windows += _last_stored_window(settings)
    frozen_before_ms = book.fence()
    if windows:
        frozen_before_ms = book.raise_fence(max(windows) + WINDOW_MS)
    adopt_log(client, log)
    moved = []
    for flow in FLOWS_WITH_A_PLACE:
        store = recovery_store(settings, flow)
        if store.exists():
            # The one before is of no use to anybody any more.
            for old in store.parent.glob(f"{flow}.other-log-*"):
                shutil.rmtree(old)
            aside = store.with_name(f"{flow}.other-log-{time.time_ns()}")
            store.rename(aside)
            moved.append(aside)
    return AdoptedLog(frozen_before_ms, moved)


def _last_stored_window(settings: Settings) -> list[int]:
    client = clickhouse_client(settings)
    database = settings.clickhouse_database
    try:
        rows = client.query(
            f"SELECT max(window_start_ms), count() FROM `{database}`.usage_events"
        ).result_rows
    except ClickHouseError as error:
        raise CommandError(f"ClickHouse does not say which windows have usage: {error}") from error
    last, count = rows[0]
    return [int(last)] if count else []
