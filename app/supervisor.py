"""`metering up`: a broker, Redis, ClickHouse and the flows as children of one process.

Laws:
- No child outlives this process, however it ends (`app.embedded.process`).
- One directory belongs to one running supervisor *and its children*: they inherit the lock on it, so the next
  one cannot open the data while a child of a killed one still dies.
- Whatever ends is started again, at once the first time and later with a growing pause, and it is said so.
- The embedded broker forgets everything when it ends. Flows never run on such a fresh log before
  `adopt_new_log` has dealt with what the old one may have held back; a marker in the directory, written
  before the flows start for the first time, tells that there was an old one.

Standard output carries one JSON line, when everything is ready. The supervisor's own messages go to standard
error, a line each; what the children say goes to `DIR/logs/<name>.log`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from types import FrameType

from bytewax.recovery import init_db_dir

from accounts.migrate import migrate as migrate_accounts
from app.accounts_service import open_database
from app.adopt_log import adopt_new_log
from app.clients import clickhouse_client, redis_client
from app.embedded import apache_kafka, broker, clickhouse, process, valkey
from app.embedded.process import LOOPBACK, Service
from app.errors import CommandError
from app.migrate import create_topics, initialise_redis, run_migrations
from schemas.rate_card import load_rate_card
from schemas.settings import Settings, load_settings, one_line

TICK_S = 0.1
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
STEADY_AFTER_S = 30.0
"""A child that ran for so long is healthy again: its next end counts as the first."""
START_ATTEMPTS = 3
FLOW_START_DEADLINE_S = 90.0
MAX_LOG_BYTES = 16 << 20
LOG_CHECK_S = 5.0

BROKERS = ("tansu", "apache")
READY_FILE = "METERING_READY_FILE"


@dataclass(frozen=True)
class Flow:
    """A process that uses the servers. It writes the file that METERING_READY_FILE names when it is ready."""

    name: str
    argv: tuple[str, ...]
    reads_broker: bool
    """Whether a fresh log concerns it: it is stopped before `adopt_new_log`, and started after it."""
    needs_recovery: bool = False
    """Whether it has a Bytewax recovery store, `DIR/recovery/<name>`; made when missing, passed as `-r`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_deadline_s: float = 10.0
    """How long it has after SIGTERM, before SIGKILL."""


@dataclass(frozen=True)
class Hooks:
    """Done to the servers before flows use them. All block, may be repeated, and raise one-line errors."""

    prepare_stores: Callable[[Settings], object]
    """Tables in ClickHouse, the epoch in Redis."""
    create_topics: Callable[[Settings], object]
    adopt_new_log: Callable[[Settings], object]
    """Run while the flows that read the broker are stopped, when the log is not the one they knew."""


def default_hooks() -> Hooks:
    """The project's own preparations."""
    return Hooks(_prepare_stores, _create_topics, adopt_new_log)


def default_flows(settings: Settings) -> tuple[Flow, ...]:
    """The project's flows, each its own Bytewax process, and the process that repairs and audits on timers."""
    return (
        bytewax_flow("settlement", settings, reads_broker=True, needs_recovery=True),
        bytewax_flow("usage_store", settings, reads_broker=True, needs_recovery=True),
        bytewax_flow("ledger", settings, reads_broker=False, needs_recovery=False),
        Flow("audit", (sys.executable, "-m", "app.repair.service"), reads_broker=True),
        bytewax_flow("alerts", settings, reads_broker=False, needs_recovery=False),
        bytewax_flow("write_off", settings, reads_broker=False, needs_recovery=False),
    )


def accounts_api(port: int) -> Flow:
    """The accounts API, on this port of the loopback."""
    command = (sys.executable, "-m", "app", "accounts", "serve", "--host", LOOPBACK, "--port", str(port))
    return Flow("accounts", command, reads_broker=False, stop_deadline_s=20.0)


def bytewax_flow(name: str, settings: Settings, reads_broker: bool, needs_recovery: bool) -> Flow:
    """A factory of `app.dataflows` as a process of one worker."""
    return Flow(
        name,
        (
            sys.executable,
            "-m",
            "bytewax.run",
            f"app.dataflows:{name}()",
            "-s",
            str(settings.epoch_interval_s),
            "-b",
            "0",
        ),
        reads_broker=reads_broker,
        needs_recovery=needs_recovery,
    )


def run_up(
    directory: Path,
    *,
    broker: str = "tansu",
    settings: Settings | None = None,
    flows: tuple[Flow, ...] | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Run everything on `directory` until SIGTERM, SIGINT or SIGHUP, then stop it in order and return 0.

    `broker` is "tansu" (embedded, in memory) or "apache" (needs Java; keeps its data). Call it in the main
    thread of a process of its own. Raises CommandError or SettingsError, one line, when it cannot start; by
    then it has stopped what it had started.
    """
    if broker not in BROKERS:
        raise CommandError(f"there is no broker {broker!r}: choose {' or '.join(BROKERS)}", exit_code=2)
    settings = load_settings() if settings is None else settings
    # A wrong one is said now, not three times by each flow.
    load_rate_card(settings.rate_card)
    directory = directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise CommandError(f"{directory}: {problem.strerror}", exit_code=2) from None
    with _only_one(directory) as lock:
        supervisor = Supervisor(
            directory,
            broker_kind=broker,
            settings=settings,
            flows=flows,
            hooks=default_hooks() if hooks is None else hooks,
            lock=lock,
        )
        return supervisor.run()


class _Asked(BaseException):
    """The supervisor was asked to stop; not an Exception, so that no retry swallows it."""


@dataclass
class _Child:
    """One program that is kept running."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    stop_deadline_s: float
    stop_signal: signal.Signals = signal.SIGTERM
    ready_file: Path | None = None
    recovery_store: Path | None = None
    """Made before each start: adopting another log puts the old one aside."""
    process: Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float | None = 0.0
    """On the monotonic clock; None while it must not run."""
    ready: bool = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """The servers and flows of one directory; `run` is its whole life, in the main thread."""

    def __init__(
        self,
        directory: Path,
        *,
        broker_kind: str,
        settings: Settings,
        flows: tuple[Flow, ...] | None,
        hooks: Hooks,
        lock: int,
    ) -> None:
        self._directory = directory
        self._broker_kind = broker_kind
        self._hooks = hooks
        self._lock = lock
        self._asked = False
        self._in_hook = False
        self._wake = threading.Event()
        self._servers: list[_Child] = []
        self._children: list[_Child] = []
        self._log_lost = False
        self._recover_at = 0.0
        self._recover_pause_s = FIRST_PAUSE_S
        self._logs_checked_at = 0.0
        (directory / "logs").mkdir(exist_ok=True)
        (directory / "ready").mkdir(exist_ok=True)
        self._ports = _choose_ports(directory / "ports.json")
        if flows is None:
            port = settings.accounts_port or self._ports["accounts"]
            flows = (*default_flows(settings), accounts_api(port))
            _say(f"the accounts API is on http://{LOOPBACK}:{port}/v1 when all is ready")
        self._flows = flows
        self._settings = settings.model_copy(
            update={
                "kafka": f"{LOOPBACK}:{self._ports['kafka']}",
                "redis": f"redis://{LOOPBACK}:{self._ports['redis']}/0",
                "clickhouse": f"http://{LOOPBACK}:{self._ports['clickhouse']}",
                "state_dir": directory,
                "broker_append_time": broker_kind != "tansu",
            }
        )

    def run(self) -> int:
        """Start, announce, keep running, stop. Returns 0 when asked to stop; raises CommandError."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            self._start_servers()
            self._prepare()
            self._start_flows()
            self._announce()
            while not self._asked:
                self._tick()
                self._pause()
        except _Asked:
            pass
        finally:
            self._stop_everything()
        return 0

    # --- starting -----------------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        """All at once, then wait for each: most of a start is Python importing things."""
        services = list(self._services())
        for service in services:
            child = _Child(
                service.name,
                service.argv,
                service.environment,
                self._fresh_log(service.name),
                service.stop_deadline_s,
                service.stop_signal,
            )
            self._servers.append(child)
            self._spawn(child)
        for child, service in zip(self._servers, services, strict=True):
            deadline = child.started_at + service.start_deadline_s
            while not service.healthy():
                self._stop_if_asked()
                if not child.running:
                    self._give_up(child)
                if time.monotonic() > deadline:
                    raise CommandError(
                        f"{child.name} did not answer within {service.start_deadline_s:g} s; see {child.log}"
                    )
                self._pause(0.02)
            child.ready = True

    def _services(self) -> Iterator[Service]:
        """In the order in which they start; the broker last, because its end is what costs most."""
        yield clickhouse.service(self._directory / "clickhouse", self._ports["clickhouse"])
        yield valkey.service(self._directory / "redis", self._ports["redis"])
        if self._broker_kind == "apache":
            yield apache_kafka.service(self._directory / "kafka", self._ports["kafka"])
        else:
            yield broker.service(self._ports["kafka"])

    def _prepare(self) -> None:
        self._call(self._hooks.prepare_stores)
        self._call(self._hooks.create_topics)
        marker = self._directory / "log_in_use"
        known = marker.read_text() if marker.exists() else None
        if known is not None and (self._forgetful or known != self._broker_kind):
            _say("the broker's log is a new one: freezing what the last one held, see `metering resettle`")
            self._call(self._hooks.adopt_new_log)
        # Before the flows start: killed right after, the next start adopts a log nobody read: no harm.
        _write(marker, self._broker_kind)

    @property
    def _forgetful(self) -> bool:
        return self._broker_kind == "tansu"

    def _start_flows(self) -> None:
        for flow in self._flows:
            child = self._child_of(flow)
            self._children.append(child)
            self._spawn(child)
        deadline = time.monotonic() + FLOW_START_DEADLINE_S
        while waiting := [child for child in self._children if not child.ready]:
            self._stop_if_asked()
            for child in self._children:
                if child.process is not None and not child.running and child.failures + 1 >= START_ATTEMPTS:
                    self._give_up(child)
            if time.monotonic() > deadline:
                raise CommandError(
                    f"{waiting[0].name} is not ready after {FLOW_START_DEADLINE_S:g} s; see {waiting[0].log}"
                )
            self._tick()
            self._pause(0.05)

    def _child_of(self, flow: Flow) -> _Child:
        argv, recovery_store = flow.argv, None
        if flow.needs_recovery:
            recovery_store = self._directory / "recovery" / flow.name
            argv = (*argv, "-r", str(recovery_store))
        ready_file = self._directory / "ready" / flow.name
        return _Child(
            flow.name,
            argv,
            {**self._addresses(flow), READY_FILE: str(ready_file), **flow.environment},
            self._fresh_log(flow.name),
            flow.stop_deadline_s,
            ready_file=ready_file,
            recovery_store=recovery_store,
        )

    def _addresses(self, flow: Flow) -> dict[str, str]:
        environment = {
            "METERING_KAFKA": self._settings.kafka,
            "METERING_REDIS": self._settings.redis,
            "METERING_CLICKHOUSE": self._settings.clickhouse,
            "METERING_STATE_DIR": str(self._directory),
            "METERING_BROKER_APPEND_TIME": str(self._settings.broker_append_time).lower(),
        }
        if self._settings.metrics_port:
            # One port cannot serve several processes: they take the ones that follow it.
            place = self._flows.index(flow)
            environment["METERING_METRICS_PORT"] = str(self._settings.metrics_port + place)
        return environment

    def _fresh_log(self, name: str) -> Path:
        log = self._directory / "logs" / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        log.touch()
        return log

    def _announce(self) -> None:
        addresses = {
            "kafka": self._settings.kafka,
            "redis": self._settings.redis,
            "clickhouse": self._settings.clickhouse,
        }
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()

    # --- keeping it running -------------------------------------------------------------------------------

    def _tick(self) -> None:
        for child in (*self._servers, *self._children):
            if child.process is not None and not child.running:
                self._on_death(child)
            if child.process is None and child.start_at is not None and child.start_at <= time.monotonic():
                self._spawn(child)
            if child.ready_file is not None and not child.ready and child.ready_file.exists():
                child.ready = True
        if self._log_lost and time.monotonic() >= self._recover_at:
            self._try_to_go_on()
        self._bound_logs()

    def _spawn(self, child: _Child) -> None:
        if child.ready_file is not None:
            child.ready_file.unlink(missing_ok=True)
        if child.recovery_store is not None:
            make_recovery_store(child.recovery_store)
        child.ready = False
        child.start_at = None
        child.started_at = time.monotonic()
        child.process = process.spawn(child.argv, child.environment, child.log, keep_open=(self._lock,))

    def _on_death(self, child: _Child) -> None:
        assert child.process is not None
        # Its own children, if it has any, must not meet their replacements.
        process.stop(child.process, deadline_s=0)
        how = process.outcome(child.process)
        child.process = None
        now = time.monotonic()
        child.failures = 0 if now - child.started_at >= STEADY_AFTER_S else child.failures + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** max(child.failures - 1, 0), LONGEST_PAUSE_S)
        child.start_at = now + pause_s
        # What ended by itself has mostly said why.
        why = "" if how.startswith("SIG") else process.last_line(child.log)
        _say(f"{child.name} ended ({how}), starting it again in {pause_s:g} s{why}")
        if child.name == "broker" and self._forgetful:
            self._lose_the_log()

    def _lose_the_log(self) -> None:
        """The broker took its data with it: nothing may read its successor before it is adopted."""
        if not self._log_lost:
            readers = self._readers()
            _say(f"the broker's log is lost: stopping {', '.join(child.name for child in readers)}")
            self._stop_together(readers)
            for child in readers:
                child.start_at = None
        self._log_lost = True
        self._recover_at = time.monotonic()

    def _try_to_go_on(self) -> None:
        server = self._servers[-1]
        if not server.running or not broker.kafka_answers(self._ports["kafka"]):
            return
        try:
            self._call(self._hooks.create_topics)
            self._call(self._hooks.adopt_new_log)
        except Exception as problem:
            self._recover_at = time.monotonic() + self._recover_pause_s
            _say(f"cannot go on yet, trying again in {self._recover_pause_s:g} s: {_short(problem)}")
            self._recover_pause_s = min(self._recover_pause_s * 2, LONGEST_PAUSE_S)
            return
        self._log_lost = False
        self._recover_pause_s = FIRST_PAUSE_S
        readers = self._readers()
        for child in readers:
            child.start_at = time.monotonic()
        _say(
            f"going on with a fresh log: topics made, old windows frozen, see `metering resettle`; starting "
            f"{', '.join(child.name for child in readers)}"
        )

    def _readers(self) -> list[_Child]:
        names = {flow.name for flow in self._flows if flow.reads_broker}
        return [child for child in self._children if child.name in names]

    def _bound_logs(self) -> None:
        if time.monotonic() - self._logs_checked_at < LOG_CHECK_S:
            return
        self._logs_checked_at = time.monotonic()
        for child in (*self._servers, *self._children):
            if child.log.stat().st_size > MAX_LOG_BYTES:
                # Children append, so they go on at the start of the emptied file. What they write between the
                # two calls is lost, which a log can bear.
                shutil.copyfile(child.log, child.log.with_suffix(".log.1"))
                os.truncate(child.log, 0)

    # --- stopping -----------------------------------------------------------------------------------------

    def _stop_everything(self) -> None:
        """The flows first, so that none meets a server that is away; then the servers."""
        self._stop_together(self._children)
        self._stop_together(self._servers)

    def _stop_together(self, children: list[_Child]) -> None:
        running = [child for child in children if child.process is not None]
        for child in running:
            if child.running and child.process is not None:
                child.process.send_signal(child.stop_signal)
        deadline = time.monotonic() + max((child.stop_deadline_s for child in running), default=0.0)
        while any(child.running for child in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        for child in running:
            if child.process is None:
                continue
            if child.running:
                _say(f"{child.name} did not stop within {child.stop_deadline_s:g} s: killing it")
            process.stop(child.process, deadline_s=0)
            child.process = None

    def _give_up(self, child: _Child) -> None:
        assert child.process is not None
        how = process.outcome(child.process)
        raise CommandError(f"{child.name} does not start ({how}){process.last_line(child.log)}")

    # --- being asked to stop ------------------------------------------------------------------------------

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        self._wake.set()
        if self._in_hook:
            # Elsewhere an exception could fall between starting a child and noting that it runs.
            self._in_hook = False
            raise _Asked

    def _call(self, hook: Callable[[Settings], object]) -> None:
        self._stop_if_asked()
        self._in_hook = True
        try:
            hook(self._settings)
        finally:
            self._in_hook = False

    def _stop_if_asked(self) -> None:
        if self._asked:
            raise _Asked

    def _pause(self, seconds: float = TICK_S) -> None:
        self._wake.wait(seconds)


# --- the directory ----------------------------------------------------------------------------------------


@contextmanager
def _only_one(directory: Path) -> Iterator[int]:
    """Hold the directory's lock. Raises CommandError when another supervisor has it.

    The children inherit the lock, so it is free only when the last of them is gone too.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + 10.0
        while not _try_lock(descriptor):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if _alive(holder):
                raise CommandError(f"{directory} is in use by process {holder}", exit_code=2)
            if time.monotonic() > deadline:
                raise CommandError(f"{directory} is still in use by children of the killed process {holder}")
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(process_id: str) -> bool:
    if not process_id.isdecimal():
        # Its owner took the lock a moment ago and is about to write its number.
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _choose_ports(file: Path) -> dict[str, int]:
    """The ports of the last run where they are still free, so that addresses survive a restart."""
    remembered: dict[str, int] = {}
    if file.exists():
        try:
            remembered = {name: int(port) for name, port in json.loads(file.read_text()).items()}
        except (ValueError, AttributeError, TypeError):
            _say(f"{file} is unreadable: choosing new ports")
    ports: dict[str, int] = {}
    for name in ("kafka", "redis", "clickhouse", "accounts"):
        port = remembered.get(name)
        if port is None or not process.port_is_free(port):
            taken = port
            port = process.free_port(frozenset((*ports.values(), *remembered.values())))
            if taken is not None:
                _say(f"port {taken} is taken: {name} is on {port} from now on")
        ports[name] = port
    _write(file, json.dumps(ports))
    return ports


def make_recovery_store(path: Path) -> None:
    """A Bytewax recovery store of one partition, unless it is there; a kill leaves all of it or nothing."""
    if path.exists():
        return
    aside = path.with_name(path.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    init_db_dir(aside, 1)  # type: ignore[no-untyped-call]
    aside.rename(path)


def _write(file: Path, text: str) -> None:
    """All or nothing, whenever this process is killed."""
    aside = file.with_name(file.name + ".new")
    aside.write_text(text)
    aside.replace(file)


# --- the project's own preparations -----------------------------------------------------------------------


def _prepare_stores(settings: Settings) -> None:
    client = clickhouse_client(settings)
    run_migrations(client, settings.clickhouse_database)
    migrate_accounts(open_database(settings))
    initialise_redis(redis_client(settings), client, settings.clickhouse_database)


def _create_topics(settings: Settings) -> None:
    create_topics(settings.kafka, settings.partitions, settings.broker_append_time)


def _say(line: str) -> None:
    sys.stderr.write(f"metering up: {line}\n")
    sys.stderr.flush()


def _short(problem: Exception) -> str:
    return one_line(str(problem))[:300] or type(problem).__name__
