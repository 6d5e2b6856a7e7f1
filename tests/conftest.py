"""Servers for the integration tests: started once; each test gets topics, a Redis and a database of its own.

They run on the embedded broker, or with METERING_TEST_BROKER=apache on Apache Kafka. A server that cannot
start fails the tests that need it; nothing is skipped.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from clickhouse_connect.driver.client import Client
from confluent_kafka.admin import AdminClient, NewTopic

import app.clients
from schemas.settings import Settings
from tests.support.services import Services, chosen_broker, running_services


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The addresses of a broker, a Redis-compatible server and ClickHouse, for the whole session."""
    with running_services(tmp_path_factory.mktemp("services"), chosen_broker()) as started:
        yield started


@pytest.fixture
def settings(services: Services, tmp_path: Path) -> Settings:
    """Settings for one test: the servers, a state directory of its own, a database that no other test has.

    The database is not made; `clickhouse` makes an empty one.
    """
    return Settings(
        kafka=services.kafka,
        redis=services.redis,
        clickhouse=services.clickhouse,
        clickhouse_database=f"test_{uuid.uuid4().hex[:12]}",
        broker_append_time=services.broker_append_time,
        state_dir=tmp_path / "state",
    )


@pytest.fixture
def clickhouse(settings: Settings) -> Iterator[Client]:
    """A ClickHouse client in an empty database, which is dropped after the test."""
    client = app.clients.clickhouse_client(settings)
    client.command(f"CREATE DATABASE {settings.clickhouse_database}", use_database=False)
    yield client
    client.command(f"DROP DATABASE {settings.clickhouse_database}", use_database=False)
    client.close()


@pytest.fixture
def redis_client(settings: Settings) -> Iterator[redis.Redis]:
    """A Redis client on an empty Redis."""
    with app.clients.redis_client(settings) as client:
        client.flushall()
        yield client


@pytest.fixture
def make_topic(settings: Settings) -> Callable[[int], str]:
    """Makes an empty topic with that many partitions, and a name that no other test has."""

    def make(partitions: int) -> str:
        name = f"test.{uuid.uuid4().hex[:12]}"
        config = {"message.timestamp.type": "LogAppendTime"} if settings.broker_append_time else {}
        admin = AdminClient({"bootstrap.servers": settings.kafka})
        for made in admin.create_topics([NewTopic(name, partitions, 1, config=config)]).values():
            made.result()
        return name

    return make
