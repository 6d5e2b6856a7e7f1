"""A flow as a container runs it: `python -m app.run_flow`, its recovery store, metrics and health check."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import redis
from clickhouse_connect.driver.client import Client
from prometheus_client.parser import text_string_to_metric_families

from app.adopt_log import recovery_store
from app.embedded.process import free_port
from app.migrate import create_topics, initialise_redis, run_migrations
from schemas.settings import Settings
from telemetry.export import described_metrics
from tests.support.dashboards import ROOT, read_yaml

START_DEADLINE_S = 60.0


@contextmanager
def running_flow(name: str, settings: Settings, metrics_port: int) -> Iterator[subprocess.Popen[str]]:
    """The flow as a process of its own, until the end of the block."""
    environment = {
        "PATH": os.environ["PATH"],
        "METERING_KAFKA": settings.kafka,
        "METERING_REDIS": settings.redis,
        "METERING_CLICKHOUSE": settings.clickhouse,
        "METERING_CLICKHOUSE_DATABASE": settings.clickhouse_database,
        "METERING_BROKER_APPEND_TIME": str(settings.broker_append_time).lower(),
        "METERING_STATE_DIR": str(settings.state_dir),
        "METERING_METRICS_PORT": str(metrics_port),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "app.run_flow", name],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def page_of(process: subprocess.Popen[str], metrics_port: int) -> str:
    """The metrics page, once there is one; fails at once when the process ended."""
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            with urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=3) as answer:
                return str(answer.read(), "utf-8")
        except URLError:
            assert time.monotonic() < deadline, "the flow serves no metrics"
            time.sleep(0.1)


@pytest.fixture
def prepared(settings: Settings, clickhouse: Client, redis_client: redis.Redis) -> Settings:
    """Settings of servers that `metering migrate` has prepared."""
    run_migrations(clickhouse, settings.clickhouse_database)
    create_topics(settings.kafka, settings.partitions, settings.broker_append_time)
    initialise_redis(redis_client, clickhouse, settings.clickhouse_database)
    return settings


def test_a_flow_runs_as_in_its_container(prepared: Settings) -> None:
    """It makes its recovery store, serves every metric that is described, is healthy, and ends on SIGTERM."""
    port = free_port()
    with running_flow("settlement", prepared, port) as process:
        page = page_of(process, port)
        served = {
            sample.name for family in text_string_to_metric_families(page) for sample in family.samples
        } | {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
        for metric in described_metrics():
            assert served & set(metric.samples()), metric.name
        assert any(recovery_store(prepared, "settlement").glob("part-*.sqlite3"))
        assert health_check(port) == 0
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    assert health_check(port) != 0


def health_check(metrics_port: int) -> int:
    """The exit code of the service's health check, asking another port."""
    service = read_yaml(ROOT / "docker-compose.yml")["services"]["settlement"]
    declared_port = str(service["environment"]["METERING_METRICS_PORT"])
    _, _, *arguments = service["healthcheck"]["test"]
    assert declared_port in arguments[-1]
    arguments[-1] = arguments[-1].replace(declared_port, str(metrics_port))
    return subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, timeout=20
    ).returncode


def test_a_flow_without_its_servers_says_so(prepared: Settings) -> None:
    """Nothing is prepared in the other database of Redis: one line, and the exit code of a failure."""
    elsewhere = prepared.model_copy(update={"redis": prepared.redis.removesuffix("/0") + "/1"})
    with running_flow("settlement", elsewhere, free_port()) as process:
        _, said = process.communicate(timeout=START_DEADLINE_S)
    assert process.returncode == 1
    assert said.startswith("metering: ")
    assert "Traceback" not in said
