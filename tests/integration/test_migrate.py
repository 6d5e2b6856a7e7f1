"""What `metering migrate` does to Kafka and Redis: makes what is missing, checks what is there, risks nothing."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from clickhouse_connect.driver.client import Client
from confluent_kafka.admin import (  # type: ignore[attr-defined] # public names that it forgets to export
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

import app.clients
from app.embedded import process
from app.migrate import TOPIC_CONFIGS, MigrationError, create_topics, initialise_redis, run_migrations
from schemas import redis_keys
from schemas.records import LedgerLine
from schemas.settings import Settings
from schemas.topics import ALERTS, COMMANDS, DEAD_LETTERS, EVENTS
from sinks.clickhouse import ClickHouseJournal
from tests.support import archive
from tests.support.archive import ledger_line

DATABASE = "migrate"


# Kafka ---------------------------------------------------------------------------------------------------


@pytest.fixture
def topics() -> dict[str, dict[str, str]]:
    """Topics that nobody has, with the settings of the real ones."""
    prefix = f"test.{uuid.uuid4().hex[:12]}"
    return {f"{prefix}.{name}": dict(config) for name, config in TOPIC_CONFIGS.items()}


def partition_counts(settings: Settings) -> dict[str, int]:
    """Topic -> number of its partitions."""
    metadata = AdminClient({"bootstrap.servers": settings.kafka}).list_topics(timeout=10)
    return {name: len(topic.partitions) for name, topic in metadata.topics.items()}


def test_missing_topics_are_made_and_existing_ones_left(
    settings: Settings, topics: dict[str, dict[str, str]]
) -> None:
    """The first call makes all of them, the second none, whatever number of partitions it is told."""
    append_time = settings.broker_append_time
    assert create_topics(settings.kafka, 3, append_time, topics=topics) == list(topics)
    assert create_topics(settings.kafka, 5, append_time, topics=topics) == []
    counts = partition_counts(settings)
    assert [counts[name] for name in topics] == [3] * len(topics)


def test_topics_get_their_settings(settings: Settings, topics: dict[str, dict[str, str]]) -> None:
    """Commands are kept for ever, dead letters may be larger than events, and the broker stamps, if it can."""
    create_topics(settings.kafka, 1, settings.broker_append_time, topics=topics)
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in topics]
    for resource, outcome in admin.describe_configs(resources).items():
        found = {name: entry.value for name, entry in outcome.result().items()}
        expected = dict(topics[resource.name])
        if settings.broker_append_time:
            expected["message.timestamp.type"] = "LogAppendTime"
        assert {name: found.get(name) for name in expected} == expected
    sizes = [int(config["max.message.bytes"]) for config in TOPIC_CONFIGS.values()]
    assert sizes == [1_048_588, 1_048_588, 1_148_588, 1_048_588]


def test_the_products_own_topics_are_made(settings: Settings) -> None:
    """Events, commands and dead letters exist after a migration."""
    create_topics(settings.kafka, 2, settings.broker_append_time)
    assert {EVENTS, COMMANDS, DEAD_LETTERS, ALERTS} <= set(partition_counts(settings))


def test_topics_made_by_two_at_once(settings: Settings, topics: dict[str, dict[str, str]]) -> None:
    """Whoever loses the race checks what the other made."""
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(
            pool.map(
                lambda _: create_topics(settings.kafka, 2, settings.broker_append_time, topics=topics),
                range(4),
            )
        )
    assert sorted(name for made in outcomes for name in made) == sorted(topics)


def test_a_topic_without_append_time_is_refused(
    settings: Settings, topics: dict[str, dict[str, str]]
) -> None:
    """Where the broker is to stamp the messages, a topic with the producers' times is one clear line."""
    name = next(iter(topics))
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    config = {"message.timestamp.type": "CreateTime"}
    admin.create_topics([NewTopic(name, 1, 1, config=config)])[name].result()
    with pytest.raises(MigrationError, match=f"{name} has message.timestamp.type=CreateTime; it must be"):
        create_topics(settings.kafka, 1, True, topics={name: {}})
    assert create_topics(settings.kafka, 1, False, topics={name: {}}) == []


def test_a_broker_that_is_not_there_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The line names the setting, and the client library stays quiet."""
    nobody = f"127.0.0.1:{process.free_port()}"
    with pytest.raises(MigrationError, match=f"METERING_KAFKA={nobody}: ") as caught:
        create_topics(nobody, 1, True, timeout_s=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


# Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture
def archived(settings: Settings) -> Iterator[Client]:
    """A client of a migrated database with empty tables."""
    client = archive.connect(settings.clickhouse, DATABASE)
    run_migrations(client, DATABASE)
    archive.empty(client, DATABASE)
    yield client
    client.close()


def journal(client: Client, *lines: LedgerLine) -> None:
    """Put lines into the ledger."""
    ClickHouseJournal(client, DATABASE).insert_lines(lines)


def test_a_new_redis_gets_its_epoch_and_fence(redis_client: redis.Redis, archived: Client) -> None:
    """Nothing anywhere: epoch 1, fence 0, and nothing else."""
    assert initialise_redis(redis_client, archived, DATABASE) == 1
    assert redis_client.get(redis_keys.EPOCH) == b"1"
    assert redis_client.get(redis_keys.FENCE) == b"0"
    assert redis_client.dbsize() == 2


def test_a_redis_in_use_stays_as_it_is(redis_client: redis.Redis, archived: Client) -> None:
    """An epoch that is there is returned; the fence and the balances are not touched."""
    redis_client.mset({redis_keys.EPOCH: 4, redis_keys.FENCE: 60_000})
    redis_client.hset(redis_keys.balance("platform/revenue"), mapping={"seq": 9, "balance_us": 5})
    journal(archived, ledger_line("platform/revenue", 9, 5, epoch=4))
    assert initialise_redis(redis_client, archived, DATABASE) == 4
    assert redis_client.get(redis_keys.FENCE) == b"60000"


def test_foreign_keys_do_not_matter(redis_client: redis.Redis, archived: Client) -> None:
    """What others keep in the same Redis is no sign of use."""
    redis_client.set("somebody:else", 1)
    assert initialise_redis(redis_client, archived, DATABASE) == 1


def test_an_empty_redis_beside_a_ledger_is_refused(redis_client: redis.Redis, archived: Client) -> None:
    """A Redis that lost everything must not start from zero."""
    journal(archived, *(ledger_line("user/u-1", seq, -5) for seq in range(1, 4)))
    message = "Redis is empty but the ledger has 3 lines: run `metering rebuild-balances`"
    with pytest.raises(MigrationError, match=message):
        initialise_redis(redis_client, archived, DATABASE)
    assert redis_client.dbsize() == 0


@pytest.mark.parametrize(
    "key", ["balance:{user/u-1}", "cell:room/r-1@0", "request:q-1", "cells", "positions", "frozen_before_ms"]
)
def test_a_redis_that_lost_its_epoch_is_refused(
    redis_client: redis.Redis, archived: Client, key: str
) -> None:
    """Any key of ours without the epoch means that part of it is gone."""
    redis_client.set(key, 1)
    with pytest.raises(MigrationError, match=r"but no epoch .*rebuild-balances") as caught:
        initialise_redis(redis_client, archived, DATABASE)
    assert key in str(caught.value)
    assert redis_client.get(redis_keys.EPOCH) is None


def test_a_redis_of_an_older_epoch_is_refused(redis_client: redis.Redis, archived: Client) -> None:
    """A Redis that came back after it was replaced must not write."""
    redis_client.mset({redis_keys.EPOCH: 1, redis_keys.FENCE: 0})
    journal(archived, ledger_line("user/u-1", 1, -5, epoch=2))
    with pytest.raises(MigrationError, match="Redis is at epoch 1 but the ledger at 2"):
        initialise_redis(redis_client, archived, DATABASE)


@pytest.mark.parametrize(("live", "refused"), [(8, True), (9, False), (10, False)])
def test_a_redis_that_lost_its_end_is_refused(
    redis_client: redis.Redis, archived: Client, live: int, refused: bool
) -> None:
    """The ledger never has a line of the platform's revenue that Redis does not know."""
    redis_client.mset({redis_keys.EPOCH: 1, redis_keys.FENCE: 0})
    redis_client.hset(redis_keys.balance("platform/revenue"), "seq", live)
    journal(archived, ledger_line("platform/revenue", 9, 5))
    if not refused:
        assert initialise_redis(redis_client, archived, DATABASE) == 1
        return
    with pytest.raises(MigrationError, match="Redis knows 8 lines of platform/revenue but the ledger 9"):
        initialise_redis(redis_client, archived, DATABASE)


def test_an_epoch_that_is_no_number_is_refused(redis_client: redis.Redis, archived: Client) -> None:
    """A damaged key is one clear line."""
    redis_client.set(redis_keys.EPOCH, "zero")
    with pytest.raises(MigrationError, match="Redis key epoch is b'zero', not a positive integer"):
        initialise_redis(redis_client, archived, DATABASE)


def test_initialised_by_many_at_once(settings: Settings, redis_client: redis.Redis, archived: Client) -> None:
    """All of them get the one epoch."""
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda _: initialise_redis(redis_client, archived, DATABASE), range(16)))
    assert epochs == [1] * 16
    assert redis_client.get(redis_keys.FENCE) == b"0"


def test_a_redis_that_is_not_there_is_one_line(settings: Settings, archived: Client) -> None:
    """No server: one line, after one attempt."""
    nobody = settings.model_copy(update={"redis": f"redis://127.0.0.1:{process.free_port()}/0"})
    with (
        app.clients.redis_client(nobody) as client,
        pytest.raises(MigrationError, match=r"Redis: .*refused") as caught,
    ):
        initialise_redis(client, archived, DATABASE)
    assert "\n" not in str(caught.value)
