"""How each kind of fault is inflicted, and how long the system takes to have caught up after it.

A kill's time runs from the SIGKILL, a disturbance's from its end. It has caught up when the probes that were sent
at that moment are on the balances and in the archive (`probes`).
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos import plan, proxy
from chaos.keeper import Stuck
from chaos.plan import Fault
from chaos.probes import Prober
from chaos.world import MEMBERS, UP, World

CATCH_UP_S = 240.0
DIES_AT_POINT_S = 60.0
ATTEMPTS_AT_POINT = 6
"""A repair with nothing to do passes no point: more load, and once more."""
MORE_LOAD_S = 3.0
SPARE_BYTES = 32_768
"""What a full Redis has left."""
ALL_TIME = ("resettle", "--since", "1970-01-01T00:00:00Z")
WRITE_OFF = ("write-off", "--patience", "120")
REBUILD = ("rebuild-balances",)


@dataclass
class Struck:
    """What a fault did."""

    kind: str
    kills: Counter[str] = field(default_factory=Counter)
    """SIGKILLs by process, whether sent from outside or by itself at a point."""
    points: Counter[str] = field(default_factory=Counter)
    """Deaths by named point."""
    disturbances: Counter[str] = field(default_factory=Counter)
    balances_s: float | None = None
    """Until everything sent before was on the balances."""
    archive_s: float | None = None
    """Until it was in the ledger and the usage store too."""
    repair_s: float | None = None
    """Until the command that was killed had done its work in a second run."""


class Attacker:
    """Inflicts faults on one world, one at a time. Everything raises Stuck when the system does not recover."""

    def __init__(self, world: World, prober: Prober) -> None:
        self._world = world
        self._prober = prober

    def strike(self, fault: Fault) -> Struck:
        """Inflict it and wait until the system has caught up."""
        struck = Struck(fault.kind)
        if fault.kind == plan.SUPERVISOR:
            self._supervisor(fault, struck)
        elif fault.kind in plan.PROCESSES:
            self._process(fault, struck)
        elif fault.kind in plan.FLOW_POINTS:
            self._flow_point(fault, struck, plan.FLOW_POINTS[fault.kind])
        elif fault.kind in plan.MIGRATION_POINTS:
            self._migration(fault, struck)
        elif fault.kind in plan.RESETTLE_POINTS:
            self._resettle(fault, struck)
        elif fault.kind in plan.REBUILD_POINTS:
            self._rebuild(fault, struck)
        elif fault.kind in plan.WRITE_OFF_POINTS:
            self._write_off(fault, struck)
        else:
            self._disturb(fault, struck)
        return struck

    def absent(self, fault: Fault) -> bool:
        """Whether this version of the system has no such process."""
        return self.absent_process(fault.kind.removeprefix("stop_"))

    def absent_process(self, name: str) -> bool:
        """Whether it is a flow that this version has not."""
        return name in plan.FLOWS and name not in self._world.flows

    # --- SIGKILL from outside -----------------------------------------------------------------------------

    def _process(self, fault: Fault, struck: Struck) -> None:
        name = MEMBERS[fault.passing % 2] if fault.kind == plan.CLUSTER else fault.kind
        self._kill(name, fault.kind, struck)
        if fault.again_after_s is not None:
            self._world.keeper.sleep(fault.again_after_s)
            self._kill(name, fault.kind, struck)
        self._catch_up(struck)

    def _kill(self, name: str, kind: str, struck: Struck) -> None:
        self._world.send(name, signal.SIGKILL)
        struck.kills[kind] += 1

    def _supervisor(self, fault: Fault, struck: Struck) -> None:
        world = self._world
        for pause_s in (None, fault.again_after_s):
            if struck.kills and pause_s is None:
                break
            world.keeper.sleep(pause_s or 0.0)
            world.keeper.await_pid(UP)
            announced, children = world.announcements(), world.descendants()
            self._kill(UP, plan.SUPERVISOR, struck)
            killed = time.monotonic()
            world.await_gone(children)
        world.await_up(announced)
        self._catch_up(struck, killed)

    def _catch_up(self, struck: Struck, since: float | None = None) -> None:
        """Wait until what is sent now is everywhere; times count from `since`, by default from now."""
        world = self._world
        probe = self._prober.send()
        since = probe.sent_at if since is None else since
        world.keeper.wait_until(
            lambda: self._prober.through(probe), f"caught up after {struck.kind}", CATCH_UP_S
        )
        assert probe.on_balances_at is not None and probe.in_archive_at is not None
        struck.balances_s = probe.on_balances_at - since
        struck.archive_s = probe.in_archive_at - since

    # --- at named points ----------------------------------------------------------------------------------

    def _flow_point(self, fault: Fault, struck: Struck, flow: str) -> None:
        """Killed from outside, it starts with the point armed, dies there, and starts once more without."""
        keeper = self._world.keeper
        keeper.arm(flow, _armed(fault))
        ended = keeper.endings[flow]
        self._kill(flow, flow, struck)
        keeper.wait_until(
            lambda: keeper.endings[flow] >= ended + 2, f"{flow} dies at {fault.kind}", DIES_AT_POINT_S
        )
        if keeper.last_outcome[flow] != signal.SIGKILL.name:
            raise Stuck(f"{flow} ended before {fault.kind}: {keeper.last_outcome[flow]}")
        struck.kills[flow] += 1
        struck.points[fault.kind] += 1
        self._catch_up(struck)

    def _migration(self, fault: Fault, struck: Struck) -> None:
        """A new database on the same server, so that nothing else is disturbed."""
        world = self._world
        database = f"chaos_{time.monotonic_ns()}"
        environment = {"METERING_CLICKHOUSE_DATABASE": database}
        try:
            self._die_and_repeat(fault, struck, "migrate", ("migrate",), environment)
        finally:
            world.archive().command(f"DROP DATABASE IF EXISTS `{database}`")

    def _rebuild(self, fault: Fault, struck: Struck) -> None:
        """Redis is emptied first; it is of no use to anybody until the rebuild is through."""
        self._world.wipe_redis()
        struck.kills["redis"] += 1
        wiped = time.monotonic()
        self._die_and_repeat(fault, struck, "rebuild-balances", REBUILD, {})
        self._catch_up(struck, wiped)

    def _resettle(self, fault: Fault, struck: Struck) -> None:
        """In turns the one that the audit runs on its timer, and the command, with the audit out of its way."""
        keeper = self._world.keeper
        if fault.passing % 2 and not self.absent_process("audit"):
            self._flow_point(fault, struck, "audit")
            return
        keeper.hold("audit")
        self._kill("audit", "audit", struck)
        # So that something falls behind the fence that needs to be corrected.
        keeper.sleep(MORE_LOAD_S)
        self._die_and_repeat(fault, struck, "resettle", ALL_TIME, {})
        keeper.release("audit")
        self._catch_up(struck)

    def _write_off(self, fault: Fault, struck: Struck) -> None:
        """Nodes that earn pay for users who owe; the comparison takes from the ledger how much, and bounds it."""
        self._world.bind_nodes()
        self._die_and_repeat(fault, struck, "write-off", WRITE_OFF, {})
        self._catch_up(struck)

    def _die_and_repeat(
        self,
        fault: Fault,
        struck: Struck,
        name: str,
        command: tuple[str, ...],
        environment: dict[str, str],
    ) -> None:
        world = self._world
        for _ in range(ATTEMPTS_AT_POINT):
            code = world.run(*command, environment={**environment, **_armed(fault)})
            if code:
                break
            world.keeper.sleep(MORE_LOAD_S)
        if code != -signal.SIGKILL:
            raise Stuck(f"metering {name} ended with exit code {code} instead of dying at {fault.kind}")
        struck.kills[name] += 1
        struck.points[fault.kind] += 1
        died = time.monotonic()
        code = world.run(*command, environment=environment)
        if code:
            raise Stuck(f"metering {name} ended with exit code {code} when it was run again")
        struck.repair_s = time.monotonic() - died

    # --- disturbances -------------------------------------------------------------------------------------

    def _disturb(self, fault: Fault, struck: Struck) -> None:
        with self._disturbance(fault, struck):
            self._world.keeper.sleep(fault.hold_s)
        struck.disturbances[fault.kind] += 1
        self._catch_up(struck)

    @contextmanager
    def _disturbance(self, fault: Fault, struck: Struck) -> Iterator[None]:
        world, kind = self._world, fault.kind
        if kind in plan.STOPS:
            name = kind.removeprefix("stop_")
            world.send(name, signal.SIGSTOP)
            yield
            world.send(name, signal.SIGCONT)
        elif kind == plan.BROKER_AWAY:
            world.keeper.hold("broker")
            self._kill("broker", "broker", struck)
            yield
            world.keeper.release("broker")
        elif kind in plan.CLICKHOUSE_TROUBLES:
            assert world.proxy is not None, "this scene runs behind the proxy"
            troubled = world.proxy.troubled
            world.proxy.mode = {
                plan.CLICKHOUSE_SLOW: proxy.SLOW,
                plan.CLICKHOUSE_ERRORS: proxy.ERRORS,
                plan.CLICKHOUSE_CUT: proxy.CUT,
            }[kind]
            yield
            world.proxy.mode = proxy.PASS
            if world.proxy.troubled == troubled:
                raise Stuck(f"{kind}: no request met it")
        elif kind == plan.REDIS_FULL:
            used = int(world.live.info("memory")["used_memory"])
            refused = self._refused_for_memory()
            world.live.config_set("maxmemory", str(used + SPARE_BYTES))
            yield
            world.live.config_set("maxmemory", "0")
            if self._refused_for_memory() == refused:
                raise Stuck(f"{kind}: nobody met it")
        else:
            filler = world.fill_disk(kind.removeprefix("disk_full_"))
            yield
            filler.unlink()

    def _refused_for_memory(self) -> int:
        """How many calls Redis has refused because it was full, since its start."""
        found = self._world.live.info("errorstats").get("errorstat_OOM")
        return int(found["count"]) if found else 0


def _armed(fault: Fault) -> dict[str, str]:
    once = (*plan.RESETTLE_POINTS, *plan.REBUILD_POINTS, *plan.WRITE_OFF_POINTS)
    passing = fault.passing if fault.kind not in once else 1
    return {"METERING_FAULT": f"{fault.kind}:{passing}"}
