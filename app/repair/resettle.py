"""`metering resettle`: drives the procedure of `metering.resettle` on the real stores."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from app.books import current_epoch, register_rates
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from app.repair.log_ends import TopicEnds
from app.steps import drive
from metering.ports import WrongRedis
from metering.resettle import Resettled, Step, resettle
from schemas.rate_card import RateCard, load_rate_card
from schemas.settings import Settings, one_line
from schemas.topics import EVENTS
from sinks.balances import RedisBalances
from sources.archive import ClickHouseArchive
from sources.kafka import WrongLog, describe_log
from telemetry import faults
from telemetry.quiet import KAFKA_LOGGER

LOOK_EVERY_S = 0.1

FAULTS = {
    Step.TOKEN_TAKEN: faults.RESETTLE_TOKEN_TAKEN,
    Step.READ: faults.RESETTLE_READ,
    Step.POSTED: faults.RESETTLE_POSTED,
}


class RepairFailed(CommandError):
    """A repair could not be completed; nothing is half done that the next run does not complete. One line."""


def run_resettle(settings: Settings, *, since_ms: int | None = None, patience_s: float = 60.0) -> Resettled:
    """One run; see `metering.resettle`. Raises RepairFailed when a server is away, or when ledger or usage store do
    not catch up within `patience_s`."""
    try:
        client = redis_client(settings)
        epoch = current_epoch(settings, client)
        card = load_rate_card(settings.rate_card)
        # Another card than the flows' would correct what is right.
        register_rates(client, card)
        book = RedisBalances(client, epoch, settings.outbox_max_entries)
        archive = open_archive(settings, clickhouse_client(settings), card)
        steps = resettle(
            book,
            archive,
            TopicEnds(settings.kafka, EVENTS),
            card,
            presence_max_ms=settings.presence_max_s * 1000,
            since_ms=since_ms,
        )
        return drive(steps, FAULTS, _patience(patience_s))
    except (redis.RedisError, ClickHouseError, KafkaException, WrongLog, WrongRedis) as error:
        raise failure(settings, error) from error


def _patience(patience_s: float) -> Callable[[Step], None]:
    """Waits at each step that waits, and loses patience."""
    deadline = time.monotonic() + patience_s

    def on_step(step: Step) -> None:
        if step is Step.WAITING:
            if time.monotonic() > deadline:
                raise RepairFailed(
                    f"the ledger or the usage store is behind, and did not catch up within {patience_s:g} s: "
                    "are the flows running?"
                )
            time.sleep(LOOK_EVERY_S)

    return on_step


def open_archive(settings: Settings, client: Client, card: RateCard) -> ClickHouseArchive:
    """The archive, for the log that the topic is now."""
    log = describe_log(AdminClient({"bootstrap.servers": settings.kafka}, logger=KAFKA_LOGGER), EVENTS)
    return ClickHouseArchive(
        client, settings.clickhouse_database, card, EVENTS, log.topic_id, settings.presence_max_s * 1000
    )


def failure(settings: Settings, error: Exception) -> RepairFailed:
    """What went wrong, in one line that says where."""
    if isinstance(error, redis.RedisError):
        return RepairFailed(f"METERING_REDIS: {one_line(str(error))}")
    if isinstance(error, ClickHouseError):
        return RepairFailed(f"METERING_CLICKHOUSE: {one_line(str(error))[:300]}")
    if isinstance(error, KafkaException):
        return RepairFailed(f"METERING_KAFKA={settings.kafka}: {one_line(error.args[0].str())}")
    return RepairFailed(str(error))
