"""The settlement flow on another number of workers, and without its recovery store: the books do not notice.

No resettle runs here: it would heal, and so hide, what goes wrong.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from app.clients import redis_client
from app.embedded.process import free_port
from app.workload import TransportEffects, WorkloadSpec, generate
from metering.cells import WINDOW_MS, window_start_ms
from metering.settle import settle_lines
from schemas import redis_keys
from schemas.decode import decode_event
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected
from sinks.balances import RedisBalances
from tests.support.flow_processes import events_taken_in, flow_process, recovering_flow, world_of_servers
from tests.support.processes import wait_until
from tests.support.world import World

MINUTES = 12


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Servers of the test's own, with the ledger flow running, and nobody else."""
    with world_of_servers(tmp_path) as made, flow_process(made, "ledger"):
        yield made


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
        with recovering_flow(world, processes=processes, workers=workers):
            known = cells_posted_to(world)
            send(world, tmp_path, lines)
            if number % 2:
                wait_until(partial(more_cells_than, known, world), "it works", 60)
            else:
                assert world.disagreements(90) == []
    assert frozen_before_ms(world) <= first_window_ms(world)


def first_window_ms(world: World) -> int:
    """The earliest window that anything was said about."""
    settled, _ = settle_lines(world.messages, load_rate_card(None))
    return min(int(line.cell_id.rpartition("@")[2]) for line in settled)


def test_another_shape_goes_on_where_the_store_says(world: World, tmp_path: Path) -> None:
    """Three workers after one do not read the log from its head: what they take in is what is new, and the little
    that came since the snapshot before."""
    first, second = messages_by_time(seed=42, events=3_000, parts=2)
    with recovering_flow(world):
        send(world, tmp_path, first)
        assert world.disagreements(90) == []
        time.sleep(4)  # Several snapshots: the place that a crash goes back to lies behind all of it.
    port = free_port()
    with recovering_flow(world, workers=3, metrics_port=port):
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
    with recovering_flow(world):
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
    with recovering_flow(world, workers=3, metrics_port=port):
        if frozen_minutes < MINUTES:
            send(world, tmp_path, second)
        wait_until(lambda: events_taken_in(port) > 0.9 * len(first + second), "the log is read again", 60)
        assert world.disagreements(90) == []
        if frozen_minutes == MINUTES:
            assert ledger_lines(world) == lines_before


def ledger_lines(world: World) -> object:
    return world.query("SELECT count() FROM {database}.ledger FINAL")[0][0]
