"""One set of servers and flows on a directory, run by the harness itself or by `metering up`.

Both run the same programs on the same directory, ports and recovery stores, so that rounds of either sort may
follow each other on the same data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import redis
from clickhouse_connect.driver.client import Client

from accounts.database import insert_if_absent
from accounts.migrate import migrate as migrate_accounts
from accounts.models import Binding, Node, User
from app.accounts_service import open_database
from app.clients import clickhouse_client, redis_client
from app.embedded import apache_kafka, broker, clickhouse, process, valkey
from app.embedded.process import LOOPBACK, Service
from app.migrate import create_topics, initialise_redis, run_migrations
from app.proof import live_balances
from app.supervisor import Flow, default_flows, make_recovery_store
from chaos.keeper import Child, Keeper, Stuck, children_of, is_running
from chaos.plan import CLUSTER, DISKS
from chaos.proxy import ClickHouseProxy
from schemas.settings import PREFIX, Settings
from sinks.clickhouse import INSERT_SETTINGS

START_S = 120.0
UP = "up"
SETTLEMENT = "settlement"
MEMBERS = (f"{SETTLEMENT}#0", f"{SETTLEMENT}#1")
"""The two processes of a settlement flow that runs as a cluster."""
DISK_MIB = {"redis": 96, "clickhouse": 384, "recovery": 24}
INSERTS_WANT_BYTES = int(str(INSERT_SETTINGS.get("min_free_disk_bytes_to_perform_insert", 1 << 20)))
"""Free space below which ClickHouse refuses an insert; by itself it wants to reserve 1 MiB."""
MARKS = {
    "broker": ("tansu", "kafka.Kafka"),
    "redis": ("valkey-server",),
    "clickhouse": ("app.embedded.clickhouse",),
    "audit": ("app.repair.service",),
}
"""What tells a command line that is no Bytewax flow's."""


class World:
    """Everything that runs in one directory. All methods are for the main thread."""

    def __init__(self, directory: Path, broker_kind: str, *, small_disks: bool = False) -> None:
        self.directory = directory.absolute()
        self.broker_kind = broker_kind
        self.keeper = Keeper()
        self.proxy: ClickHouseProxy | None = None
        self.cluster = False
        self.flows: tuple[str, ...] = ()
        """Of the round."""
        self.up_pid: int | None = None
        self._mounts: list[Path] = []
        for name in ("logs", "ready", "recovery"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        if small_disks:
            self._mount_disks()
        self.ports = _choose_ports(self.directory / "ports.json")
        self.settings = Settings(
            kafka=f"{LOOPBACK}:{self.ports['kafka']}",
            redis=f"redis://{LOOPBACK}:{self.ports['redis']}/0",
            clickhouse=f"http://{LOOPBACK}:{self.ports['clickhouse']}",
            state_dir=self.directory,
            broker_append_time=broker_kind != "tansu",
        )
        self._services = {service.name: service for service in self._make_services()}
        self._live: redis.Redis | None = None
        self._archive: Client | None = None

    def _make_services(self) -> tuple[Service, ...]:
        data = self.directory
        messages = (
            apache_kafka.service(data / "kafka", self.ports["kafka"])
            if self.broker_kind == "apache"
            else broker.service(self.ports["kafka"])
        )
        return (
            clickhouse.service(data / "clickhouse", self.ports["clickhouse"]),
            valkey.service(data / "redis", self.ports["redis"]),
            messages,
        )

    # --- clients ------------------------------------------------------------------------------------------

    @property
    def live(self) -> redis.Redis:
        """Redis; one client for the life of the world."""
        if self._live is None:
            self._live = redis_client(self.settings)
        return self._live

    def archive(self) -> Client:
        """ClickHouse. Raises ServerAway; `forget_archive` after an error makes the next call connect anew."""
        if self._archive is None:
            self._archive = clickhouse_client(self.settings)
        return self._archive

    def forget_archive(self) -> None:
        """The connection broke."""
        self._archive = None

    def healthy(self, server: str) -> bool:
        """Whether the server answers now."""
        return self._services[server].healthy()

    # --- running it ourselves -------------------------------------------------------------------------------

    def start_servers(self) -> None:
        """Start those that do not run, and wait until all answer. Raises Stuck."""
        for service in self._services.values():
            if service.name not in self.keeper.names:
                log = self.directory / "logs" / f"{service.name}.log"
                self.keeper.add(Child(service.name, service.argv, service.environment, log))
        for service in self._services.values():
            self.keeper.wait_until(service.healthy, f"{service.name} answers", START_S)

    def prepare(self) -> None:
        """Tables, topics, epoch: what `metering migrate` does. May be repeated."""
        archive = self.archive()
        run_migrations(archive, self.settings.clickhouse_database)
        create_topics(self.settings.kafka, self.settings.partitions, self.settings.broker_append_time)
        initialise_redis(self.live, archive, self.settings.clickhouse_database)
        (self.directory / "log_in_use").write_text(self.broker_kind)

    def start_flows(
        self, settings: Mapping[str, str], *, cluster: bool = False, proxied: bool = False
    ) -> None:
        """Start the flows of a round with its settings, settlement as two processes if `cluster`, and ClickHouse
        behind a proxy if `proxied`."""
        environment = self.environment | as_environment(settings)
        if proxied:
            self.proxy = ClickHouseProxy(self.ports["clickhouse"], str(self.directory))
            environment["METERING_CLICKHOUSE"] = f"http://{LOOPBACK}:{self.proxy.port}"
        self.cluster = cluster
        flows = default_flows(_with(self.settings, settings))
        self.flows = tuple(flow.name for flow in flows)
        for flow in flows:
            if cluster and flow.name == SETTLEMENT:
                self._start_cluster(flow, environment)
            else:
                self._add_flow(flow, flow.name, (), environment)

    def _start_cluster(self, flow: Flow, environment: Mapping[str, str]) -> None:
        first = process.free_port()
        addresses = f"{LOOPBACK}:{first};{LOOPBACK}:{process.free_port(frozenset({first}))}"
        for number, member in enumerate(MEMBERS):
            self._add_flow(flow, member, ("-i", str(number), "-a", addresses), environment, group=CLUSTER)

    def _add_flow(
        self, flow: Flow, name: str, options: tuple[str, ...], environment: Mapping[str, str], group: str = ""
    ) -> None:
        argv = (*flow.argv, *options)
        make_store = None
        if flow.needs_recovery:
            store = self.directory / "recovery" / flow.name
            argv = (*argv, "-r", str(store))

            def make_store() -> None:
                make_recovery_store(store)

        log = self.directory / "logs" / f"{flow.name}.log"
        self.keeper.add(Child(name, argv, {**environment, **flow.environment}, log, group, make_store))

    @property
    def environment(self) -> dict[str, str]:
        """For programs that shall talk to this world."""
        return {
            "METERING_KAFKA": self.settings.kafka,
            "METERING_REDIS": self.settings.redis,
            "METERING_CLICKHOUSE": self.settings.clickhouse,
            "METERING_STATE_DIR": str(self.directory),
            "METERING_BROKER_APPEND_TIME": str(self.settings.broker_append_time).lower(),
        }

    def stop_flows(self) -> None:
        """Ask all flows to end, and the proxy with them."""
        self.keeper.remove([name for name in self.keeper.names if name not in self._services])
        if self.proxy is not None:
            self.proxy.close()
            self.proxy = None

    def stop_servers(self) -> None:
        """Ask all servers to end."""
        self.keeper.remove([name for name in self.keeper.names if name in self._services], deadline_s=30.0)

    # --- having `metering up` run it ------------------------------------------------------------------------

    def start_up(self, settings: Mapping[str, str]) -> None:
        """Run `metering up` on the directory, started again whenever it ends. Nothing else may run."""
        self.cluster = False
        self.flows = tuple(flow.name for flow in default_flows(_with(self.settings, settings)))
        log = self.directory / "logs" / f"{UP}.log"
        argv = (sys.executable, "-m", "app", UP, "--dir", str(self.directory), "--broker", self.broker_kind)
        log.touch()
        self.keeper.add(Child(UP, argv, as_environment(settings), log))
        self.await_up(0)

    def await_up(self, announced_before: int) -> None:
        """Wait for one more announcement in its log than there were. Raises Stuck."""
        self.keeper.wait_until(
            lambda: self.announcements() > announced_before, "metering up is ready", START_S, every_s=0.1
        )

    def announcements(self) -> int:
        """How often `metering up` said that it is ready, in this round."""
        log = self.directory / "logs" / f"{UP}.log"
        return sum(line.startswith('{"kafka"') for line in log.read_text(errors="replace").splitlines())

    def stop_up(self) -> None:
        """Ask `metering up` to end, with everything it runs."""
        self.keeper.remove([UP], deadline_s=60.0)
        (self.directory / "logs" / f"{UP}.log").unlink(missing_ok=True)

    @property
    def supervised(self) -> bool:
        """Whether `metering up` runs this world now."""
        return UP in self.keeper.names

    # --- its processes ----------------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """The process of a server, a flow or the supervisor, whoever started it; None while it does not run."""
        if not self.supervised or name == UP:
            return self.keeper.pid(name)
        supervisor = self.keeper.pid(UP)
        if supervisor is None:
            return None
        marks = MARKS.get(name, (f"app.dataflows:{name}()",))
        for pid, line in children_of(supervisor).items():
            if any(mark in line for mark in marks):
                return pid
        return None

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal, as soon as the process runs. Raises Stuck."""
        while True:
            self.keeper.wait_until(lambda: self.pid(name) is not None, f"{name} runs", START_S)
            pid = self.pid(name)
            if pid is None:
                continue
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
            return

    def descendants(self) -> list[int]:
        """The processes that `metering up` started."""
        supervisor = self.keeper.pid(UP)
        return [] if supervisor is None else list(children_of(supervisor))

    def await_gone(self, pids: list[int]) -> None:
        """Wait until none of these processes runs. Raises Stuck: a child outlived its supervisor."""
        self.keeper.wait_until(
            lambda: not any(map(is_running, pids)), "the children of the killed supervisor end", 15.0
        )

    def run(
        self, *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 300.0
    ) -> int:
        """Run a `metering` command to its end while everything else is kept running; its exit code, negative for
        a signal. Its output goes to `logs/commands.log`. Raises Stuck."""
        log = self.directory / "logs" / "commands.log"
        command = (sys.executable, "-m", "app", *arguments)
        running: subprocess.Popen[bytes] = process.spawn(
            command, {**self.environment, **(environment or {})}, log
        )
        try:
            self.keeper.wait_until(
                lambda: running.poll() is not None, f"metering {' '.join(arguments)} ends", timeout_s
            )
        except Stuck:
            process.stop(running, deadline_s=0)
            raise
        return running.returncode

    def bind_nodes(self) -> None:
        """Bind every node that has credit to every user below zero who has none, in a migrated accounts
        database."""
        database = open_database(self.settings)
        migrate_accounts(database)
        balances = live_balances(self.live)
        users = [
            name.removeprefix("user/") for name, us in balances.items() if name.startswith("user/") and us < 0
        ]
        nodes = [
            name.removeprefix("node/") for name, us in balances.items() if name.startswith("node/") and us > 0
        ]
        with database.write() as session:
            for user_id in users:
                insert_if_absent(session, User, _person(user_id))
            for node_id in nodes:
                insert_if_absent(session, User, _person(f"owner-of-{node_id}"))
                insert_if_absent(session, Node, _machine(node_id))
            for number, user_id in enumerate(users):
                for position, node_id in enumerate(nodes[number % len(nodes) :] if nodes else [], 1):
                    binding = {"user_id": user_id, "node_id": node_id, "position": position, "bound_at_ms": 0}
                    insert_if_absent(session, Binding, binding)
        database.close()

    # --- disks ------------------------------------------------------------------------------------------------

    def _mount_disks(self) -> None:
        for name in DISKS:
            disk = self.directory / name
            disk.mkdir(exist_ok=True)
            size = f"size={DISK_MIB[name]}m"
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", size, "chaos", str(disk)], check=False, capture_output=True
            )
            if done.returncode:
                self._unmount_disks()
                raise Stuck(f"a small disk cannot be mounted ({done.stderr.decode().strip()}): needs root")
            self._mounts.append(disk)

    def _unmount_disks(self) -> None:
        for disk in self._mounts:
            subprocess.run(["umount", str(disk)], check=False, capture_output=True)
        self._mounts.clear()

    def fill_disk(self, name: str) -> Path:
        """Make a file that takes what is free, at once; whoever deletes it makes room again.

        To ClickHouse is left a bit less than inserts want to find: that refuses every new one, and lets those and
        the merges end that are under way. (When the last byte goes while a part is being written, chDB keeps an
        empty part and says nothing; the rows are gone at its next start. That is a fault of the engine, which
        `metering reconcile` finds, and none that a flow could survive.)
        """
        filler = self.directory / name / "filler"
        left_bytes = INSERTS_WANT_BYTES * 3 // 4 if name == "clickhouse" else 0
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filler.parent).free - left_bytes)
            while not left_bytes:
                file.seek(0, os.SEEK_END)
                file.write(b"\0" * 4096)
        return filler

    # --- ending -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End everything."""
        if self.supervised:
            self.stop_up()
        self.stop_flows()
        self.stop_servers()

    def remove(self) -> None:
        """End everything and delete the directory."""
        self.stop()
        self._unmount_disks()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wipe_redis(self) -> None:
        """Kill Redis, delete what it kept, and start it empty. Raises Stuck."""
        self.keeper.hold("redis")
        self.send("redis", signal.SIGKILL)
        self.keeper.wait_until(lambda: self.pid("redis") is None, "redis is gone", 10.0)
        for kept in (self.directory / "redis").iterdir():
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
        self.keeper.release("redis")
        self.keeper.wait_until(lambda: self.healthy("redis"), "redis answers", START_S)


def as_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings by name as environment variables; one that this version does not have is left out."""
    return {PREFIX + name.upper(): value for name, value in settings.items() if name in Settings.model_fields}


def _with(base: Settings, settings: Mapping[str, str]) -> Settings:
    known = {name: value for name, value in settings.items() if name in Settings.model_fields}
    return Settings(**{**base.model_dump(), **known})


def _choose_ports(file: Path) -> dict[str, int]:
    """In the file in which `metering up` keeps them too."""
    ports: dict[str, int] = {}
    for name in ("kafka", "redis", "clickhouse"):
        ports[name] = process.free_port(frozenset(ports.values()))
    file.write_text(json.dumps(ports))
    return ports


def _person(user_id: str) -> dict[str, object]:
    return {
        "user_id": user_id,
        "username": user_id[:32],
        "username_key": user_id[:32],
        "email": f"{user_id}@example.com",
        "email_key": f"{user_id}@example.com",
        "password_hash": "",
        "role": "user",
        "display_name": "",
        "language": "en",
        "security_code_mac": user_id,
        "security_code_sealed": "",
        "created_at_ms": 0,
        "updated_at_ms": 0,
    }


def _machine(node_id: str) -> dict[str, object]:
    return {
        "node_id": node_id,
        "name": node_id,
        "owner_id": f"owner-of-{node_id}",
        "secret_hash": "",
        "created_at_ms": 0,
        "updated_at_ms": 0,
    }
