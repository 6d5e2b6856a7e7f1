"""`metering rebuild-balances`: drives the procedure of `metering.rebuild` on the real stores."""

from __future__ import annotations

import time
from collections.abc import Iterator

import redis
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from app.books import REVISION_BITS, keep_generation, remembered_epoch
from app.clients import clickhouse_client, redis_client
from app.repair.log_ends import TopicEnds
from app.repair.resettle import LOOK_EVERY_S, failure, open_archive
from app.steps import drive
from metering.ports import BalanceBook, SeenEntry, WrongRedis
from metering.rebuild import Rebuilt, Step, rebuild
from schemas.commands import Command
from schemas.decode import check_append_time, decode_command
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected
from schemas.settings import Settings
from schemas.topics import COMMANDS, EVENTS
from sinks.balances import RedisBalances
from sinks.balances_rebuild import RedisEmptyBook
from sources.kafka import WrongLog, consumer_settings
from telemetry import faults
from telemetry.quiet import KAFKA_LOGGER

FAULTS = {
    Step.EPOCH_REMOVED: faults.REBUILD_EPOCH_REMOVED,
    Step.BALANCES_WRITTEN: faults.REBUILD_BALANCES_WRITTEN,
    Step.COMMANDS_READ: faults.REBUILD_COMMANDS_READ,
}


def run_rebuild(settings: Settings, *, patience_s: float = 60.0) -> Rebuilt:
    """One run; see `metering.rebuild`. The flows may be running: they refuse to work until it is over, and go on
    by themselves. `patience_s` is how long to wait for the usage store to catch up with Kafka. Raises RepairFailed
    when a server is away; then Redis is refused by everybody until a run comes to its end."""
    try:
        client = redis_client(settings)
        card = load_rate_card(settings.rate_card)
        archive = open_archive(settings, clickhouse_client(settings), card)

        def open_book(epoch: int, seen: int) -> BalanceBook:
            keep_generation(client, archive.newest_generation(REVISION_BITS))
            return RedisBalances(client, epoch, settings.outbox_max_entries, seen_entry=SeenEntry(seen))

        deadline = time.monotonic() + patience_s
        steps = rebuild(
            RedisEmptyBook(client),
            archive,
            TopicEnds(settings.kafka, EVENTS),
            open_book,
            lambda: _commands(settings),
            remembered_epoch=remembered_epoch(settings),
            now_ms=lambda: time.time_ns() // 1_000_000,
            tired_of_waiting=lambda: time.monotonic() > deadline,
        )
        return drive(steps, FAULTS, _wait)
    except (redis.RedisError, ClickHouseError, KafkaException, WrongLog, WrongRedis) as error:
        raise failure(settings, error) from error


def _commands(settings: Settings) -> Iterator[Command]:
    """Every valid command that the topic holds now, in the order of each partition. What is not valid is a dead
    letter already, or becomes one when the flow reads it."""
    spans = TopicEnds(settings.kafka, COMMANDS).spans()
    consumer = Consumer(consumer_settings(settings.kafka), logger=KAFKA_LOGGER)
    try:
        for partition, (first, end) in spans.items():
            next_offset = first
            consumer.assign([TopicPartition(COMMANDS, partition, first)])
            while next_offset < end:
                for message in consumer.consume(num_messages=1_000, timeout=1.0):
                    error = message.error()
                    if error is not None:
                        if error.code() == KafkaError._PARTITION_EOF:
                            next_offset = end
                        elif not error.retriable():
                            raise KafkaException(error)
                        continue
                    offset = message.offset() or 0
                    if offset >= end:
                        next_offset = end
                        break
                    next_offset = offset + 1
                    try:
                        command = decode_command(message.value())
                        if settings.broker_append_time:
                            check_append_time(command.time_ms, message.timestamp()[1])
                    except Rejected:
                        continue
                    yield command
    finally:
        consumer.close()


def _wait(step: Step) -> None:
    if step is Step.WAITING:
        time.sleep(LOOK_EVERY_S)
