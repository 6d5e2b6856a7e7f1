"""The alerts flow as a process: who fell past a threshold is told on Kafka, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import redis
from confluent_kafka import Consumer, TopicPartition

from app.migrate import create_topics
from metering.live import CellPosting, Emission
from schemas import redis_keys
from schemas.alerts import BALANCE_FELL_TYPE
from schemas.commands import Command, CommandKind
from schemas.messages import OutboxMessage
from schemas.redis_keys import LOW_US
from schemas.settings import Settings
from schemas.topics import ALERTS
from sinks.balances import RedisBalances
from sinks.outbox import RedisOutbox
from sources.kafka import consumer_settings
from telemetry import faults
from telemetry.quiet import KAFKA_LOGGER
from tests.support.dashboards import ROOT
from tests.support.processes import wait_until

FLOOR_US = -18_000_000_000


@pytest.fixture
def prepared(settings: Settings, redis_client: redis.Redis) -> Settings:
    """A topic of alerts with what other tests left in it, and an empty Redis."""
    create_topics(settings.kafka, settings.partitions, settings.broker_append_time)
    redis_client.set(redis_keys.EPOCH, 1)
    return settings


@contextmanager
def alerting(settings: Settings, directory: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The flow as a process of its own, until the end of the block."""
    command = [sys.executable, "-m", "bytewax.run", "app.dataflows:alerts()"]
    told = {
        "PATH": os.environ["PATH"],
        "METERING_KAFKA": settings.kafka,
        "METERING_REDIS": settings.redis,
        "METERING_STATE_DIR": str(directory),
        "METERING_BROKER_APPEND_TIME": str(settings.broker_append_time).lower(),
        **environment,
    }
    with subprocess.Popen(command, cwd=ROOT, env=told, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


class Alerts:
    """What comes on the topic from now on."""

    def __init__(self, settings: Settings) -> None:
        self._consumer = Consumer(consumer_settings(settings.kafka), logger=KAFKA_LOGGER)
        partitions = self._consumer.list_topics(ALERTS, timeout=20).topics[ALERTS].partitions
        places = [TopicPartition(ALERTS, number) for number in partitions]
        ends = [self._consumer.get_watermark_offsets(place, timeout=20)[1] for place in places]
        self._consumer.assign(
            [TopicPartition(ALERTS, place.partition, end) for place, end in zip(places, ends, strict=True)]
        )
        self.messages: list[tuple[bytes, bytes]] = []

    def read(self) -> list[dict]:
        """Everything so far, as events."""
        for message in self._consumer.consume(100, timeout=0.5):
            if message.error() is None:
                self.messages.append((message.key() or b"", message.value() or b""))
        return [json.loads(value) for _, value in self.messages]


def charge(book: RedisBalances, user: str, spent_us: int, revision: int) -> None:
    cell = CellPosting(f"session/{user}@0", 0, revision, {f"user/{user}": -spent_us}, "")
    book.post([Emission(f"session/{user}", [cell], None, [])])


def top_up(book: RedisBalances, user: str, amount_us: int) -> None:
    book.apply_command(
        Command(CommandKind.TOP_UP, f"user/{user}", amount_us, f"q-{user}", "card", "x", None, "web", "c", 0)
    )


def test_a_user_who_never_stops_is_told_of_once_each(
    prepared: Settings, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Killed between the sending and the noting, the flow sends the same events again, under the same ids."""
    book = RedisBalances(redis_client, 1, 1_000)
    alerts = Alerts(prepared)
    top_up(book, "u-1", LOW_US)
    with alerting(prepared, tmp_path, METERING_FAULT=f"{faults.AFTER_ALERTS_SENT}:2") as killed:
        charge(book, "u-1", 1, 1)
        wait_until(lambda: len(alerts.read()) == 1, "the first alert", 60)
        for revision, spent_us in enumerate(
            (LOW_US, LOW_US + 5, LOW_US - FLOOR_US, LOW_US - FLOOR_US + 9), 2
        ):
            charge(book, "u-1", spent_us, revision)
        killed.wait(60)
    with alerting(prepared, tmp_path):
        last = redis_client.xrevrange(redis_keys.LEDGER_STREAM, count=1)[0][0]
        wait_until(
            lambda: redis_client.get(redis_keys.ALERTS_SENT) == last, "the place of the last entry", 60
        )
    said = alerts.read()
    assert len(said) > 3, "some came twice"
    by_id = {event["id"]: event for event in said}
    assert all(event == by_id[event["id"]] for event in said)
    assert [(event["data"]["threshold"], event["data"]["balance_us"]) for event in by_id.values()] == [
        ("low", LOW_US - 1),
        ("zero", -5),
        ("floor", FLOOR_US),
    ]
    assert {key for key, _ in alerts.messages} == {b"user/u-1"}
    schema = json.loads((ROOT / "schemas" / "exported" / f"{BALANCE_FELL_TYPE}.json").read_text())
    for event in said:
        jsonschema.validate(event, schema)


def test_what_is_stored_but_not_told_stays_in_the_outbox(redis_client: redis.Redis) -> None:
    """Up to half of the outbox' bound; beyond that money goes first."""
    redis_client.set(redis_keys.EPOCH, 1)
    book = RedisBalances(redis_client, 1, 1_000)
    for revision in range(1, 11):
        charge(book, "u-1", revision, revision)
    ids = [entry_id for entry_id, _ in redis_client.xrange(redis_keys.LEDGER_STREAM)]
    redis_client.set(redis_keys.ALERTS_SENT, ids[3])
    last = OutboxMessage(ids[-1], {})
    assert RedisOutbox(redis_client, 1, 0, 1_000).note_stored(last, 10) == 7
    assert redis_client.xrange(redis_keys.LEDGER_STREAM)[0][0] == ids[3]
    assert RedisOutbox(redis_client, 1, 0, 10).note_stored(last, 10) == 1
