"""Flows as processes of a test's own, in any shape, beside servers of its own: what `metering up` does not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from app.clients import clickhouse_client, redis_client
from app.embedded.process import free_port
from app.migrate import create_topics, initialise_redis, run_migrations
from app.supervisor import make_recovery_store
from tests.support.services import chosen_broker, running_services
from tests.support.world import World


@contextmanager
def world_of_servers(directory: Path) -> Iterator[World]:
    """Servers, with tables, topics and an epoch, and no flow at all."""
    with running_services(directory / "servers", chosen_broker()) as servers:
        addresses = {"kafka": servers.kafka, "redis": servers.redis, "clickhouse": servers.clickhouse}
        made = World(addresses, servers.broker_append_time, os.getpid(), directory / "state")
        made.directory.mkdir()
        settings = made.settings
        client = clickhouse_client(settings)
        run_migrations(client, settings.clickhouse_database)
        create_topics(settings.kafka, settings.partitions, settings.broker_append_time)
        initialise_redis(redis_client(settings), client, settings.clickhouse_database)
        yield made


@contextmanager
def flow_process(world: World, flow: str, *options: str, metrics_port: int = 0) -> Iterator[None]:
    """One process of a flow, until the end of the block, when it is killed."""
    directory = world.directory
    environment = world.environment | {
        "METERING_STATE_DIR": str(directory),
        "METERING_METRICS_PORT": str(metrics_port),
    }
    command = [sys.executable, "-m", "bytewax.run", f"app.dataflows:{flow}()", *options]
    with (directory / f"{flow}.log").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def recovering_flow(
    world: World,
    flow: str = "settlement",
    *,
    processes: int = 1,
    workers: int = 1,
    metrics_port: int = 0,
) -> Iterator[None]:
    """The flow on so many processes with so many workers each, on one recovery store; killed at the end."""
    store = world.directory / "store" / flow
    store.parent.mkdir(exist_ok=True)
    make_recovery_store(store)
    options = ["-r", str(store), "-s", "1", "-b", "0", "-w", str(workers)]
    if processes > 1:
        options += ["-a", ";".join(f"127.0.0.1:{free_port()}" for _ in range(processes))]
    with ExitStack() as flows:
        for number in range(processes):
            place = ["-i", str(number)] if processes > 1 else []
            running = flow_process(world, flow, *place, *options, metrics_port=metrics_port)
            flows.enter_context(running)
        yield


def events_taken_in(metrics_port: int) -> int:
    """How many valid events a process has read, by its own metrics; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as page:
            text = page.read().decode()
    except OSError:
        return 0
    found = re.findall(r'^metering_events_total\{[^}]*flow="settlement"[^}]*\} (\S+)$', text, re.MULTILINE)
    return sum(int(float(value)) for value in found)
