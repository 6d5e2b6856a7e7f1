"""The settlement flow on another number of workers, and without its recovery store: the books do not notice.

No resettle runs here: it would heal, and so hide, what goes wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from app.clients import redis_client
from app.embedded.process import free_port
from app.supervisor import make_recovery_store
from app.workload import TransportEffects, WorkloadSpec, generate
from metering.cells import WINDOW_MS, window_start_ms
from metering.settle import settle_lines
from schemas import redis_keys
from schemas.decode import decode_event
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected
from sinks.balances import RedisBalances
from tests.e2e.test_workers import prepare
from tests.support.processes import wait_until
from tests.support.services import chosen_broker, running_services
from tests.support.world import World

MINUTES = 12


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Servers of the test's own, with the ledger flow running, and nobody else."""
    with running_services(tmp_path / "servers", chosen_broker()) as servers:
        addresses = {"kafka": servers.kafka, "redis": servers.redis, "clickhouse": servers.clickhouse}
        made = World(addresses, servers.broker_append_time, os.getpid(), tmp_path / "state")
        prepare(made.settings)
        made.directory.mkdir()
        with flow_process(made, made.directory, "ledger"):
            yield made


@contextmanager
def flow_process(
    world: World, directory: Path, flow: str, *options: str, metrics_port: int = 0
) -> Iterator[None]:
    """One process of a flow, until the end of the block, when it is killed."""
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
def settlement(
    world: World, directory: Path, *, processes: int = 1, workers: int = 1, metrics_port: int = 0
) -> Iterator[None]:
    """The flow on so many processes with so many workers each, on one recovery store; killed at the end."""
    store = directory / "store"
    make_recovery_store(store)
    options = ["-r", str(store), "-s", "1", "-b", "0", "-w", str(workers)]
    if processes > 1:
        options += ["-a", ";".join(f"127.0.0.1:{free_port()}" for _ in range(processes))]
    with ExitStack() as flows:
        for number in range(processes):
            place = ["-i", str(number)] if processes > 1 else []
            running = flow_process(
                world, directory, "settlement", *place, *options, metrics_port=metrics_port
            )
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


def messages_by_time(seed: int, events: int, parts: int) -> list[list[bytes]]:
    """A workload whose event times lie in the minutes before now, in parts of equal length in event time."""
    start_ms = window_start_ms(time.time_ns() // 1_000_000) - MINUTES * WINDOW_MS
    effects = TransportEffects(duplicates=0.1, disorder=0.2, junk=0.02)
    lines = generate(
        WorkloadSpec(seed=seed, events=events, start_ms=start_ms, minutes=MINUTES, transport=effects)
    )
    found: list[list[bytes]] = [[] for _ in range(parts)]
    part = 0
    for line in lines:
        with suppress(Rejected):  # It stays with what came before it.
            part = min((decode_event(line).time_ms - start_ms) * parts // (MINUTES * WINDOW_MS), parts - 1)
        found[part].append(line)
    return found


def send(world: World, tmp_path: Path, lines: list[bytes]) -> None:
    """Send and remember them."""
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    world.emit(file)


def more_cells_than(count: int, world: World) -> bool:
    return cells_posted_to(world) > count


def cells_posted_to(world: World) -> int:
    return int(redis_client(world.settings).zcard(redis_keys.LIVE_CELLS))


def frozen_before_ms(world: World) -> int:
    return int(redis_client(world.settings).get(redis_keys.FENCE) or 0)


def test_from_one_worker_to_three_and_back(world: World, tmp_path: Path) -> None:
    """One worker, three processes, one process with three workers, and one again: killed at rest or in the middle
    of the work, and each takes over the live cells from the same store. No window freezes meanwhile."""
    shapes = [(1, 1), (3, 1), (1, 3), (3, 1), (1, 1)]
    parts = messages_by_time(seed=41, events=4_000, parts=len(shapes))
    for number, ((processes, workers), lines) in enumerate(zip(shapes, parts, strict=True)):
        with settlement(world, world.directory, processes=processes, workers=workers):
            known = cells_posted_to(world)
            send(world, tmp_path, lines)
            if number % 2:
                wait_until(partial(more_cells_than, known, world), "it works", 60)
            else:
                assert world.disagreements(90) == []
    assert 0 < frozen_before_ms(world) <= first_window_ms(world)


def first_window_ms(world: World) -> int:
    """The earliest window that anything was said about."""
    settled, _ = settle_lines(world.messages, load_rate_card(None))
    return min(int(line.cell_id.rpartition("@")[2]) for line in settled)


def test_another_shape_goes_on_where_the_store_says(world: World, tmp_path: Path) -> None:
    """Three workers after one do not read the log from its head: what they take in is what is new, and the little
    that came since the snapshot before."""
    first, second = messages_by_time(seed=42, events=3_000, parts=2)
    with settlement(world, world.directory):
        send(world, tmp_path, first)
        assert world.disagreements(90) == []
        time.sleep(4)  # Several snapshots: the place that a crash goes back to lies behind all of it.
    port = free_port()
    with settlement(world, world.directory, workers=3, metrics_port=port):
        send(world, tmp_path, second)
        assert world.disagreements(90) == []
        assert 0.9 * len(second) < events_taken_in(port) < len(second) + 0.5 * len(first)


@pytest.mark.parametrize("frozen_minutes", [0, 4, MINUTES])
def test_a_recovery_store_that_is_lost_charges_nothing_twice(
    frozen_minutes: int, world: World, tmp_path: Path
) -> None:
    """Removed while the flow is down, with all windows live, with some that froze meanwhile, and with all of them:
    the flow reads from Kafka's head, on three workers, and what was charged stays charged, once. What it reads of
    frozen windows still says who is present above them."""
    first, second = messages_by_time(seed=43, events=3_000, parts=2)
    with settlement(world, world.directory):
        send(world, tmp_path, first)
        if frozen_minutes == MINUTES:
            send(world, tmp_path, second)
        assert world.disagreements(90) == []
        lines_before = ledger_lines(world)
    shutil.rmtree(world.directory / "store")
    if frozen_minutes:
        book = RedisBalances(redis_client(world.settings), 1, 1_000_000)
        book.raise_fence(first_window_ms(world) + frozen_minutes * WINDOW_MS)
    port = free_port()
    with settlement(world, world.directory, workers=3, metrics_port=port):
        if frozen_minutes < MINUTES:
            send(world, tmp_path, second)
        wait_until(lambda: events_taken_in(port) > 0.9 * len(first + second), "the log is read again", 60)
        assert world.disagreements(90) == []
        if frozen_minutes == MINUTES:
            assert ledger_lines(world) == lines_before


def ledger_lines(world: World) -> object:
    return world.query("SELECT count() FROM {database}.ledger FINAL")[0][0]
