"""Real servers for tests: a broker, a Redis-compatible server and ClickHouse, on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.embedded import apache_kafka, broker, clickhouse, process, valkey
from app.embedded.process import LOOPBACK, Service

BROKER_VARIABLE = "METERING_TEST_BROKER"


@dataclass(frozen=True)
class Services:
    """Where the servers are, as settings take it."""

    kafka: str
    redis: str
    clickhouse: str
    broker_append_time: bool
    """Whether the broker can stamp messages with its own time."""


def chosen_broker() -> str:
    """Which broker the suite runs on: "tansu", or "apache" with METERING_TEST_BROKER=apache."""
    chosen = os.environ.get(BROKER_VARIABLE) or "tansu"
    assert chosen in ("tansu", "apache"), f"{BROKER_VARIABLE}={chosen}: it is tansu or apache"
    return chosen


@contextmanager
def running_services(directory: Path, broker_kind: str) -> Iterator[Services]:
    """All three servers, with their data in `directory`, until the end of the block. None is skipped."""
    ports: list[int] = []
    for _ in range(3):
        ports.append(process.free_port(frozenset(ports)))
    kafka, redis, http = ports
    if broker_kind == "apache":
        messages = apache_kafka.service(directory / "kafka", kafka)
    else:
        messages = broker.service(kafka)
    with ExitStack() as stack:
        for service in (
            messages,
            valkey.service(directory / "redis", redis),
            clickhouse.service(directory / "clickhouse", http),
        ):
            stack.enter_context(running_service(service, directory / f"{service.name}.log"))
        yield Services(
            kafka=f"{LOOPBACK}:{kafka}",
            redis=f"redis://{LOOPBACK}:{redis}/0",
            clickhouse=f"http://{LOOPBACK}:{http}",
            broker_append_time=broker_kind == "apache",
        )


@contextmanager
def running_service(service: Service, log: Path) -> Iterator[None]:
    """One server, until the end of the block."""
    child = process.start(service, log)
    try:
        yield
    finally:
        process.stop(child, service.stop_deadline_s, service.stop_signal)
