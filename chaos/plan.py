"""What will be done, from a seed: worlds, their rounds, and the faults of each round.

A world is one set of servers with their data; it lives for some rounds and is compared as a whole after each. Its
kind says which windows freeze in it, and so what may be claimed before a repair:

- "live": the fence stands far behind. Each round must agree without any resettle.
- "outage": the broker is away for longer than the fence's distance. Nothing may become late by that, so it too
  must agree without any resettle.
- "freezing": the fence follows closely and much arrives behind it. Each round ends with a resettle.
- "disk": servers and flows have small disks of their own, which fill up. As "live" otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from telemetry import faults as points

SERVERS = ("redis", "clickhouse", "broker")
FLOWS = ("settlement", "usage_store", "ledger", "audit")
CLUSTER = "cluster"
"""One process of a settlement flow that runs as two."""
SUPERVISOR = "supervisor"
PROCESSES = (*FLOWS, *SERVERS, CLUSTER, SUPERVISOR)
"""What is killed with SIGKILL from outside."""

FLOW_POINTS: Mapping[str, str] = {
    points.AFTER_REDIS_SCRIPT: "settlement",
    points.AFTER_CLICKHOUSE_INSERT: "ledger",
    points.AFTER_USAGE_INSERT: "usage_store",
}
"""Points of a flow, with the flow. It is killed, started with the point armed, and dies there by itself."""
MIGRATION_POINTS = (points.DURING_MIGRATION,)
RESETTLE_POINTS = (points.RESETTLE_TOKEN_TAKEN, points.RESETTLE_READ, points.RESETTLE_POSTED)
REBUILD_POINTS = (
    points.REBUILD_EPOCH_REMOVED,
    points.REBUILD_BALANCES_WRITTEN,
    points.REBUILD_COMMANDS_READ,
)
WRITE_OFF_POINTS = (points.WRITE_OFF_PLANNED, points.WRITE_OFF_SENT, points.WRITE_OFF_CLOSED_ONE)
POINTS = (*FLOW_POINTS, *MIGRATION_POINTS, *RESETTLE_POINTS, *REBUILD_POINTS, *WRITE_OFF_POINTS)

STOPS = tuple(f"stop_{name}" for name in (*FLOWS, *SERVERS))
"""SIGSTOP, and SIGCONT after a while."""
BROKER_AWAY = "broker_away"
CLICKHOUSE_SLOW, CLICKHOUSE_ERRORS, CLICKHOUSE_CUT = "clickhouse_slow", "clickhouse_errors", "clickhouse_cut"
CLICKHOUSE_TROUBLES = (CLICKHOUSE_SLOW, CLICKHOUSE_ERRORS, CLICKHOUSE_CUT)
REDIS_FULL = "redis_full"
DISKS = ("redis", "clickhouse", "recovery")
DISKS_FULL = tuple(f"disk_full_{name}" for name in DISKS)
DISTURBANCES = (*STOPS, BROKER_AWAY, *CLICKHOUSE_TROUBLES, REDIS_FULL, *DISKS_FULL)

KINDS = (*PROCESSES, *POINTS, *DISTURBANCES)

LOSES_THE_LOG = frozenset({"broker", SUPERVISOR})
"""Not for a broker that keeps its log in memory: with it goes what nobody has read yet."""

STOP_S = (12.0, 16.0)
"""Longer than the time-out of a Redis call (10 s)."""
LONG_STOP_S = 130.0
"""Longer than every time-out: Redis 10 s, Kafka 60 s, ClickHouse 120 s."""
AWAY_S = 130.0
AWAY_FENCE_LAG_S = 100
"""A bit less than the broker is away, more than what the load itself is behind the clock."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    pause_s: float
    """The load flows for so long before it."""
    again_after_s: float | None = None
    """Killed once more so long after the kill, while it recovers."""
    passing: int = 1
    """At a point: the how-manieth passing kills."""
    hold_s: float = 0.0
    """How long a disturbance lasts."""


@dataclass(frozen=True)
class Round:
    """Faults under one load, then rest and the comparison."""

    number: int
    """From 1, over all worlds."""
    scene: str
    faults: tuple[Fault, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the flows, by name."""


@dataclass(frozen=True)
class WorldPlan:
    """Rounds on one set of data."""

    number: int
    kind: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Scene:
    """How often each kind comes in a round of this name, the order being dealt anew each time."""

    deals: Mapping[str, int]


SCENES: Mapping[str, Scene] = {
    "kills": Scene(
        {
            **dict.fromkeys(("audit", *SERVERS), 3),
            **dict.fromkeys((*FLOW_POINTS, *MIGRATION_POINTS), 4),
            **dict.fromkeys(("settlement", "usage_store", "ledger"), 1),
        }
    ),
    "up": Scene({SUPERVISOR: 4, **dict.fromkeys((*FLOWS, *SERVERS), 1)}),
    "cluster": Scene({CLUSTER: 6, "redis": 1, "broker": 1, "ledger": 1}),
    "trouble": Scene(
        {**dict.fromkeys(CLICKHOUSE_TROUBLES, 1), REDIS_FULL: 1, "clickhouse": 1, "ledger": 1, "redis": 1}
    ),
    "stops": Scene(dict.fromkeys(STOPS, 1)),
    "repair": Scene({**dict.fromkeys((*RESETTLE_POINTS, *REBUILD_POINTS), 4), "settlement": 1, "audit": 1}),
    "debts": Scene({**dict.fromkeys(WRITE_OFF_POINTS, 6), "settlement": 1, "ledger": 1, "redis": 1}),
    "away": Scene({BROKER_AWAY: 1}),
    "disk": Scene({**dict.fromkeys(DISKS_FULL, 1), "redis": 1, "ledger": 1}),
}

WORLDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("live", ("kills", "up", "cluster")),
    ("freezing", ("repair",)),
    ("live", ("kills", "trouble", "up")),
    ("disk", ("disk",)),
    ("freezing", ("repair",)),
    ("live", ("cluster", "kills", "debts")),
    ("freezing", ("repair", "up")),
    ("live", ("stops", "debts")),
    ("outage", ("away",)),
)
"""Worlds follow each other in this order, over and over."""


@dataclass(frozen=True)
class Wishes:
    """What the plan shall be made of, besides the seed."""

    seed: int
    broker_keeps_log: bool = True
    only: tuple[str, ...] = ()
    """Kinds of faults; empty for all."""
    scenes: tuple[str, ...] = ()
    """Scenes; empty for all."""
    faults_per_round: int | None = None
    quick: bool = False
    """Short pauses and short disturbances, for a test."""


def worlds(wishes: Wishes) -> Iterator[WorldPlan]:
    """Worlds without end. Raises ValueError when nothing is left of what was wished for."""
    number = 0
    round_number = 0
    while True:
        before = round_number
        for kind, scenes in WORLDS:
            rounds = []
            for scene in scenes:
                planned = _round(wishes, kind, scene, round_number + 1)
                if planned is not None:
                    round_number += 1
                    rounds.append(planned)
            if rounds:
                number += 1
                yield WorldPlan(number, kind, tuple(rounds))
        if round_number == before:
            raise ValueError("no scene has any of these faults")


def _round(wishes: Wishes, world: str, scene: str, number: int) -> Round | None:
    if wishes.scenes and scene not in wishes.scenes:
        return None
    rng = Random(f"{wishes.seed}/round/{number}")
    kinds = [
        kind
        for kind, times in SCENES[scene].deals.items()
        for _ in range(times)
        if (not wishes.only or kind in wishes.only) and (wishes.broker_keeps_log or kind not in LOSES_THE_LOG)
    ]
    if not kinds:
        return None
    rng.shuffle(kinds)
    faults = [_fault(kind, rng, wishes.quick) for kind in kinds[: wishes.faults_per_round]]
    return Round(number, scene, tuple(faults), _settings(world, rng))


def _fault(kind: str, rng: Random, quick: bool) -> Fault:
    pause_s = rng.uniform(0.2, 0.5 if quick else 1.5)
    again_after_s = rng.uniform(0.1, 2.0) if kind in PROCESSES and rng.random() < 0.25 else None
    passing = rng.randint(1, 12 if kind in MIGRATION_POINTS else 4)
    if kind in STOPS:
        long = rng.random() < 0.1
        hold_s = 2.0 if quick else LONG_STOP_S if long else rng.uniform(*STOP_S)
    elif kind == BROKER_AWAY:
        hold_s = AWAY_S
    else:
        hold_s = rng.uniform(1.0, 2.0) if quick else rng.uniform(3.0, 8.0)
    return Fault(kind, pause_s, again_after_s, passing, hold_s)


def _settings(world: str, rng: Random) -> dict[str, str]:
    """Of the flows. Small times make what takes hours happen within a round; some rounds keep the defaults."""
    settings = {
        "epoch_interval_s": rng.choice(("1", "2", "10")),
        "emit_interval_ms": rng.choice(("0", "200")),
        "usage_linger_ms": rng.choice(("50", "500")),
        "idle_timeout_s": rng.choice(("15", "300")),
        "outbox_retention_s": rng.choice(("0", "30", "3600")),
    }
    if world == "freezing":
        settings |= {
            "epoch_interval_s": "1",
            "fence_lag_s": rng.choice(("20", "40")),
            "fence_interval_s": "1",
        }
    if world == "outage":
        settings |= {"epoch_interval_s": "1", "fence_lag_s": str(AWAY_FENCE_LAG_S), "fence_interval_s": "1"}
    return settings


def repairs_before_check(world: WorldPlan) -> bool:
    """Whether windows freeze in this world in front of usage, so that only a resettle makes it whole."""
    return world.kind == "freezing"
