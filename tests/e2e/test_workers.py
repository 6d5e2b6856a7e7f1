"""The flows as anybody may run them: `python -m bytewax.run`, on several workers, in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bytewax.recovery import init_db_dir

from app.clients import clickhouse_client, redis_client
from app.embedded.process import free_port
from app.migrate import create_topics, initialise_redis, run_migrations
from schemas.settings import Settings
from tests.support.commands import metering
from tests.support.services import chosen_broker, running_services
from tests.support.world import World


@contextmanager
def bytewax_run(world: World, directory: Path, flow: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One process of a flow."""
    environment = world.environment | {"METERING_STATE_DIR": str(directory)}
    log = directory / f"{flow}-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bytewax.run", f"app.dataflows:{flow}()", *options],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_several_workers_in_several_processes_settle_the_same(tmp_path: Path) -> None:
    """Settlement as a cluster of two processes of which one is killed and the cluster started again; the usage
    store with two workers in one process."""
    events = tmp_path / "events.jsonl"
    made = metering(
        *("generate", "--seed", "5", "--events", "4000", "--duplicates", "0.1", "--disorder", "0.2"),
        *("--out", str(events)),
    )
    assert made.returncode == 0, made.stderr.decode()
    with running_services(tmp_path / "servers", chosen_broker()) as servers, ExitStack() as flows:
        addresses = {"kafka": servers.kafka, "redis": servers.redis, "clickhouse": servers.clickhouse}
        world = World(addresses, servers.broker_append_time, os.getpid(), tmp_path)
        prepare(world.settings)
        for name in ("settlement", "usage_store"):
            (tmp_path / name).mkdir()
            init_db_dir(tmp_path / name, 2)
        flows.enter_context(bytewax_run(world, tmp_path, "ledger"))
        flows.enter_context(
            bytewax_run(
                world,
                tmp_path,
                "usage_store",
                "-w",
                "2",
                "-r",
                str(tmp_path / "usage_store"),
                "-s",
                "1",
                "-b",
                "0",
            )
        )
        cluster = f"127.0.0.1:{free_port()};127.0.0.1:{free_port()}"
        common = ("-a", cluster, "-r", str(tmp_path / "settlement"), "-s", "1", "-b", "0")
        with (
            bytewax_run(world, tmp_path, "settlement", "-i", "0", *common) as first,
            bytewax_run(world, tmp_path, "settlement", "-i", "1", *common) as second,
        ):
            world.emit(events, "--rate", "1000")
            assert (first.poll(), second.poll()) == (None, None)
            second.send_signal(signal.SIGKILL)
            # What is left of a cluster does not go on, and does not always end by itself: it is killed whole.
            first.kill()
        for process in ("0", "1"):
            flows.enter_context(bytewax_run(world, tmp_path, "settlement", "-i", process, *common))
        assert world.disagreements(90) == []


def prepare(settings: Settings) -> None:
    """What `metering migrate` does."""
    client = clickhouse_client(settings)
    run_migrations(client, settings.clickhouse_database)
    create_topics(settings.kafka, 4, settings.broker_append_time)
    initialise_redis(redis_client(settings), client, settings.clickhouse_database)
