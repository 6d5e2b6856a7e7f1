"""Servers for the benchmarks: started for one run, on loopback, gone with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.embedded import apache_kafka, broker, process, valkey


@dataclass(frozen=True)
class Servers:
    """Where they listen."""

    kafka: str
    redis: str
    broker_append_time: bool

    @property
    def environment(self) -> dict[str, str]:
        """Settings for a process that shall use them."""
        return {
            "METERING_KAFKA": self.kafka,
            "METERING_REDIS": self.redis,
            "METERING_BROKER_APPEND_TIME": str(self.broker_append_time).lower(),
        }


@contextmanager
def broker_and_redis(directory: Path, broker_kind: str) -> Iterator[Servers]:
    """A broker ("tansu" or "apache") and a Redis with `appendfsync always`."""
    kafka_port, redis_port = process.free_port(), process.free_port()
    apache = broker_kind == "apache"
    kafka = apache_kafka.service(directory / "kafka", kafka_port) if apache else broker.service(kafka_port)
    services = (kafka, valkey.service(directory / "redis", redis_port))
    running = []
    try:
        for service in services:
            running.append(process.start(service, directory / f"{service.name}.log"))
        yield Servers(f"127.0.0.1:{kafka_port}", f"redis://127.0.0.1:{redis_port}/0", apache)
    finally:
        for child in running:
            process.stop(child, deadline_s=0)


@contextmanager
def everything(
    directory: Path, broker_kind: str, settings: Mapping[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """`metering up` with these settings (METERING_... -> value), and the addresses that it announces."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("METERING_")}
    with (directory / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "app", "up", "--dir", str(directory / "up"), "--broker", broker_kind],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment | dict(settings or {}),
        )
    try:
        assert up.stdout is not None
        line = up.stdout.readline()
        if not line:
            raise RuntimeError(f"metering up did not start: {(directory / 'up.log').read_text()}")
        yield json.loads(line)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)
