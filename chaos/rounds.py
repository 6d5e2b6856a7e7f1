"""A round: load, faults one after the other, rest, comparison. And the run: rounds until enough is enough."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import redis

from app.errors import CommandError
from chaos.attack import ALL_TIME, Attacker, Struck
from chaos.bill import LogReader, bill_of
from chaos.books import Verdict, compare, read_stores
from chaos.keeper import Stuck
from chaos.load import LoadShape, Sender, digest, parcels
from chaos.plan import Round, Wishes, WorldPlan, repairs_before_check, worlds
from chaos.probes import Prober
from chaos.world import World
from schemas.rate_card import load_rate_card
from schemas.topics import COMMANDS, EVENTS

AGREE_S = 90.0
AGREE_EVERY_S = 1.0
SETTLE_START_S = 150.0
LIVE_RESETTLE_INTERVAL_S = "86400"
"""In worlds that must agree without a repair none may run by itself."""
FREEZING_RESETTLE_INTERVAL_S = "3"
"""What falls behind the fence, or is frozen by a rebuild, is charged by a resettle; the probes wait for it."""
RESETTLE_ATTEMPTS = 5

Say = Callable[[str], None]


@dataclass
class Played:
    """What became of a round."""

    seed: int
    world: int
    world_kind: str
    round: Round
    struck: list[Struck] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    stuck: str = ""
    """What did not happen in time; empty when everything did."""
    messages: int = 0
    """In the log of the world at the end of the round."""
    accounts: int = 0
    cell_lines: int = 0
    """Amounts that were compared: accounts of cells."""
    seconds: float = 0.0
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Ends that nobody asked for, by (process, how); a flow that gives up and is started again is no error."""

    @property
    def passed(self) -> bool:
        """Whether all of it came to rest and nothing is wrong."""
        return not self.stuck and self.verdict.clean


class Judge:
    """Reads the log on and compares the stores with its bill."""

    def __init__(self, world: World) -> None:
        self._world = world
        settings = world.settings
        self._events = LogReader(settings.kafka, EVENTS, settings.partitions)
        self._commands = LogReader(settings.kafka, COMMANDS, settings.partitions)

    def judge(
        self,
        acknowledged: Mapping[str, set[bytes]],
        played: Played,
        late_allowed: bool,
        patience_s: float = AGREE_S,
    ) -> None:
        """Compare until they agree or `patience_s` have passed, and note what is wrong then. Raises Stuck."""
        world = self._world
        self._events.read_on()
        self._commands.read_on()
        for topic, reader in ((EVENTS, self._events), (COMMANDS, self._commands)):
            logged = {digest(message.value) for message in reader.in_order()}
            missing = acknowledged[topic] - logged
            if missing:
                raise Stuck(f"the broker lost {len(missing)} messages of {topic} that it had acknowledged")
        bill = bill_of(
            self._events.in_order(),
            self._commands.in_order(),
            load_rate_card(None),
            world.settings.broker_append_time,
        )
        played.messages = sum(map(len, self._events.messages.values()))
        played.cell_lines = len(bill.by_cell)
        played.accounts = len(bill.balances())
        deadline = time.monotonic() + patience_s
        while True:
            try:
                stores = read_stores(world.live, world.archive(), world.settings.clickhouse_database)
                played.verdict = compare(bill, stores, late_allowed=late_allowed)
            except (redis.RedisError, CommandError) as problem:
                world.forget_archive()
                if time.monotonic() > deadline:
                    raise Stuck(f"the stores cannot be read: {problem}") from None
            else:
                if played.verdict.clean or time.monotonic() > deadline:
                    return
            world.keeper.sleep(AGREE_EVERY_S)


def play_round(
    world: World, judge: Judge, kind: WorldPlan, planned: Round, seed: int, rate_per_s: int, say: Say
) -> Played:
    """One round from start to verdict. Whatever does not happen in time is in the result, not raised."""
    played = Played(seed, kind.number, kind.kind, planned)
    started = time.monotonic()
    ended_before = Counter(world.keeper.ended)
    try:
        _play(world, judge, kind, planned, seed, rate_per_s, say, played)
    except (Stuck, CommandError, redis.RedisError) as problem:
        played.stuck = str(problem)
    played.seconds = time.monotonic() - started
    played.ended = world.keeper.ended - ended_before
    return played


def _play(
    world: World,
    judge: Judge,
    kind: WorldPlan,
    planned: Round,
    seed: int,
    rate_per_s: int,
    say: Say,
    played: Played,
) -> None:
    freezing = repairs_before_check(kind)
    settings = dict(planned.settings)
    settings["resettle_interval_s"] = FREEZING_RESETTLE_INTERVAL_S if freezing else LIVE_RESETTLE_INTERVAL_S
    name = f"{seed}-{planned.number}"
    if planned.scene == "up":
        world.stop_servers()
        world.start_up(settings)
    else:
        world.start_servers()
        world.start_flows(settings, cluster=planned.scene == "cluster", proxied=planned.scene == "trouble")
    sender = Sender(world.settings.kafka, quick_reconnect=planned.scene != "away")
    prober = Prober(world, sender, name)
    attacker = Attacker(world, prober)
    held_back = 0.05 if freezing else 0.0 if kind.kind == "outage" else 0.02
    shape = LoadShape(rate_per_s, held_back, 60.0 if freezing else 20.0)
    sender.start(parcels(name, shape, time.time_ns() // 1_000_000), rate_per_s)
    try:
        first = prober.send()
        world.keeper.wait_until(lambda: prober.through(first), "the flows have started", SETTLE_START_S)
        for fault in planned.faults:
            if attacker.absent(fault):
                say(f"    {fault.kind}: there is no such process in this version")
                continue
            world.keeper.sleep(fault.pause_s)
            struck = attacker.strike(fault)
            played.struck.append(struck)
            say(f"    {describe(struck)}")
    finally:
        sender.stop()
    last = prober.send()
    sender.stop()
    world.keeper.wait_until(lambda: prober.through(last), "everything has come to rest", SETTLE_START_S)
    if freezing:
        _resettle(world)
    judge.judge(sender.acknowledged, played, late_allowed=freezing)
    if played.verdict.clean and (code := world.run("reconcile")):
        raise Stuck(f"the books agree, but metering reconcile ended with exit code {code}")
    if planned.scene == "up":
        world.stop_up()
    else:
        world.stop_flows()


def _resettle(world: World) -> None:
    """The last word on frozen windows. One that the audit's own run overtakes is run again."""
    for _ in range(RESETTLE_ATTEMPTS):
        if not (code := world.run(*ALL_TIME)):
            return
    raise Stuck(f"metering resettle ended with exit code {code}")


def describe(struck: Struck) -> str:
    """One line."""
    kills = ", ".join(f"{name} {count}" for name, count in struck.kills.items())
    times = [
        f"{what} {seconds:.1f} s"
        for what, seconds in (
            ("balances", struck.balances_s),
            ("archive", struck.archive_s),
            ("repaired", struck.repair_s),
        )
        if seconds is not None
    ]
    return f"{struck.kind:26} killed: {kills or '-':32} {', '.join(times)}"


def play(
    wishes: Wishes,
    directory: Path,
    *,
    broker: str,
    rate_per_s: int,
    until: Callable[[int], bool],
    say: Say,
) -> Iterator[Played]:
    """Rounds until `until(rounds played)`, or until one fails, whose world is stopped and kept then."""
    number = 0
    for world_plan in worlds(wishes):
        if until(number):
            return
        world = World(directory / f"world-{world_plan.number}", broker, small_disks=world_plan.kind == "disk")
        keep = False
        try:
            world.start_servers()
            world.prepare()
            judge = Judge(world)
            for planned in world_plan.rounds:
                if until(number):
                    break
                say(
                    f"round {planned.number}, world {world_plan.number} ({world_plan.kind}), "
                    f"scene {planned.scene}: {len(planned.faults)} faults, {_shown(planned.settings)}"
                )
                keep = True
                played = play_round(world, judge, world_plan, planned, wishes.seed, rate_per_s, say)
                keep = not played.passed
                number += 1
                yield played
                if keep:
                    return
        finally:
            if keep:
                world.stop()
                disks = " (with its small disks mounted: umount them)" if world_plan.kind == "disk" else ""
                say(f"kept: {world.directory}{disks}")
            else:
                world.remove()


def _shown(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
