"""`metering demo`: the main job from nothing, on embedded services, in under a minute.

It starts what `metering up` starts, in a directory of its own, gives users minutes, lets a generated workload
flow in at a pace that eyes can follow, and then shows where every microsecond went: a bill, a statement, an
analyst's query, and the proof that Redis, the ledger and the pure settlement agree.
"""

from __future__ import annotations

import io
import json
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import redis
from clickhouse_connect.driver.client import Client
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from app import proof
from app.clients import clickhouse_client, redis_client
from app.emit import Emitter, message_key
from app.errors import CommandError
from app.money_commands import top_up_message
from app.tables import bill_table, minutes_text, statement_table
from app.views import Balance, query_rows, read_balances, read_bill, read_statement
from app.workload import TransportEffects, WorkloadSpec, generate
from metering.money import US_PER_MINUTE
from metering.settle import LineReject, SettledLine, settle_lines
from schemas import topics
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected
from schemas.settings import Settings, load_settings

SEED = 7
EVENTS = 4_000
MINUTES = 10
USERS = 10
EFFECTS = TransportEffects(duplicates=0.05, disorder=0.10, junk=0.003)
TOP_UP_US = 10 * US_PER_MINUTE
FLOW_S = 15.0
"""The workload is sent over so many seconds, though its own time spans MINUTES."""
START_DEADLINE_S = 45.0
AGREE_DEADLINE_S = 20.0
FRAME_S = 0.25
PIPE_WIDTH = 110
STATEMENT_LINES = 8


def run_demo(svg: Path | None) -> int:
    """Run it; the exit code is 0 when the books agree. With `svg` a picture of it is written there."""
    screen = Screen(recorded=svg is not None)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="metering-demo-") as directory:
        screen.say("Starting a broker, a Redis-compatible server, ClickHouse and three flows ...")
        with services(Path(directory)) as settings:
            screen.say(
                f"  ready after {time.monotonic() - started_s:.1f} s: {settings.kafka}, {settings.redis}, "
                f"{settings.clickhouse}"
            )
            agreed = _show(screen, settings)
    screen.say(f"Everything is stopped and removed again; {time.monotonic() - started_s:.0f} s in all.")
    if svg is not None:
        screen.save(svg)
    return 0 if agreed else 1


class Screen:
    """The terminal, or a plain pipe; and a second, invisible one that is kept for a picture."""

    def __init__(self, recorded: bool) -> None:
        console = Console(highlight=False)
        # A pipe has no width of its own and takes no control codes.
        self.console = console if console.is_terminal else Console(width=PIPE_WIDTH, highlight=False)
        self._record = (
            Console(record=True, width=PIPE_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
            if recorded
            else None
        )

    @property
    def is_live(self) -> bool:
        """Whether a table can be redrawn in place."""
        return self.console.is_terminal

    def say(self, text: str) -> None:
        """One line of plain text."""
        self._both(text)

    def show(self, renderable: RenderableType) -> None:
        """A table, with an empty line before it."""
        self._both("")
        self._both(renderable)

    def keep(self, renderable: RenderableType) -> None:
        """For the picture only: what the terminal shows in motion."""
        if self._record is not None:
            self._record.print(renderable)

    def save(self, path: Path) -> None:
        """Write the picture. Raises CommandError when the file cannot be written."""
        assert self._record is not None
        picture = self._record.export_svg(title="metering demo")
        # A picture must not fetch fonts from somewhere; any fixed-width one will do.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
        try:
            path.write_text(picture, encoding="utf-8")
        except OSError as problem:
            raise CommandError(f"{path}: {problem.strerror or problem}", exit_code=2) from None

    def _both(self, renderable: RenderableType) -> None:
        self.console.print(renderable, markup=False)
        if self._record is not None:
            self._record.print(renderable, markup=False)


@contextmanager
def services(directory: Path) -> Iterator[Settings]:
    """`metering up` as a child, as anybody would run it; gives the settings that reach it.

    Raises CommandError, with its last words, when it does not come up in START_DEADLINE_S.
    """
    log = directory / "up.log"
    # Without this the child would go on after us.
    signal.signal(signal.SIGTERM, _leave)
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "app", "up", "--dir", str(directory / "data")],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            addresses = _first_line(child, log)
            yield load_settings().model_copy(update={**addresses, "broker_append_time": False})
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _leave(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _first_line(child: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], START_DEADLINE_S)
    line = child.stdout.readline() if readable else b""
    try:
        addresses: dict[str, str] = json.loads(line)
    except json.JSONDecodeError:
        said = log.read_text(errors="replace").strip().splitlines()
        why = said[-1].removeprefix("metering: ") if said else "it said nothing"
        raise CommandError(f"the services did not start: {why}") from None
    return addresses


@dataclass
class Demo:
    """What is sent, and what must come of it."""

    lines: list[bytes]
    settled: list[SettledLine]
    rejects: list[LineReject]
    users: list[str]
    room: str
    duplicates: int

    @property
    def top_ups_us(self) -> dict[str, int]:
        """Everybody starts with the same."""
        return dict.fromkeys(self.users, TOP_UP_US)


def prepare(settings: Settings) -> Demo:
    """A workload that ends now, its pure settlement, and the room whose bill is worth a look."""
    now_ms = time.time_ns() // 1_000_000
    spec = WorkloadSpec(
        seed=SEED,
        start_ms=now_ms - MINUTES * 60_000,
        events=EVENTS,
        minutes=MINUTES,
        sessions=12,
        rooms=6,
        users=USERS,
        nodes=4,
        transport=EFFECTS,
    )
    lines = list(generate(spec))
    settled, rejects = settle_lines(lines, load_rate_card(settings.rate_card), settings.presence_max_s * 1000)
    payers: Counter[str] = Counter()
    for scope, _ in {
        (line.cell_id.rpartition("@")[0], line.account)
        for line in settled
        if line.account.startswith("user/")
    }:
        payers[scope] += 1
    return Demo(
        lines=lines,
        settled=settled,
        rejects=rejects,
        users=sorted({line.account for line in settled if line.account.startswith("user/")}),
        room=min(payers, key=lambda scope: (abs(payers[scope] - 5), scope)),
        duplicates=len(lines) - EVENTS - len(rejects),
    )


def _show(screen: Screen, settings: Settings) -> bool:
    demo = prepare(settings)
    live = redis_client(settings)
    archive = clickhouse_client(settings)
    _top_up(settings, demo)
    _await_balances(live, demo)
    screen.say(f"  {len(demo.users)} users got {minutes_text(TOP_UP_US)} minutes each.")
    screen.say(
        f"Sending {len(demo.lines):,} messages, {MINUTES} minutes of talk in {FLOW_S:.0f} s: "
        f"many out of order, {demo.duplicates} repeats, {len(demo.rejects)} broken ..."
    )
    _flow(screen, settings, demo, live)
    differences, waited_s = _await_agreement(settings, demo, live, archive)
    database = settings.clickhouse_database
    screen.show(bill_table(read_bill(archive, database, demo.room)))
    screen.show(statement_table(read_statement(archive, database, demo.users[0], STATEMENT_LINES)))
    screen.show(_earnings_table(archive, database))
    screen.show(_counts_table(archive, database, demo))
    return _say_proof(screen, demo, differences, waited_s)


def _top_up(settings: Settings, demo: Demo) -> None:
    now_ms = time.time_ns() // 1_000_000
    with Emitter(settings.kafka, topics.COMMANDS) as emitter:
        for account, amount_us in demo.top_ups_us.items():
            message, _ = top_up_message(
                account, amount_us, request_id=None, reason="welcome", actor="demo", now_ms=now_ms
            )
            emitter.send(message, account.encode())
    _require_delivered(emitter)


def _require_delivered(emitter: Emitter) -> None:
    if emitter.summary.failed:
        raise CommandError(f"{emitter.summary.failed} messages were not delivered: {emitter.summary.why()}")


def _await_balances(client: redis.Redis, demo: Demo) -> None:
    deadline_s = time.monotonic() + AGREE_DEADLINE_S
    while len(read_balances(client, demo.users)) < len(demo.users):
        if time.monotonic() > deadline_s:
            raise CommandError("the top-ups did not reach the balances")
        time.sleep(0.05)


def _flow(screen: Screen, settings: Settings, demo: Demo, client: redis.Redis) -> None:
    """Send everything over FLOW_S, with the balances on the screen as they fall."""
    total = len(demo.lines)
    started_s = time.monotonic()
    sent = 0
    with (
        Emitter(settings.kafka, topics.EVENTS) as emitter,
        Live(console=screen.console, auto_refresh=False) if screen.is_live else _plain() as display,
    ):
        while sent < total:
            due = min(total, int((time.monotonic() - started_s) / FLOW_S * total) + 1)
            for line in demo.lines[sent:due]:
                emitter.send(line, message_key(line))
            sent, before = due, sent
            table = _live_table(read_balances(client, demo.users), sent, total)
            if display is not None:
                display.update(table, refresh=True)
            elif sent == total or sent * 3 // total > before * 3 // total:
                screen.console.print(table)
            emitter.wait(FRAME_S)
        screen.keep(table)
    _require_delivered(emitter)


@contextmanager
def _plain() -> Iterator[None]:
    yield None


def _live_table(balances: list[Balance], sent: int, total: int) -> Table:
    table = Table(title=f"Live balances in Redis, {sent:,} of {total:,} messages sent", title_justify="left")
    table.add_column("user")
    table.add_column("minutes left", justify="right")
    table.add_column("us", justify="right")
    table.add_column("postings", justify="right")
    table.add_column("of 10 minutes", width=30)
    for entry in balances:
        left = max(0.0, min(1.0, entry.balance_us / TOP_UP_US))
        table.add_row(
            entry.account.removeprefix("user/"),
            minutes_text(entry.balance_us),
            f"{entry.balance_us:,}",
            f"{entry.seq - 1:,}",
            "█" * round(left * 30) + "░" * (30 - round(left * 30)),
        )
    return table


def _await_agreement(
    settings: Settings, demo: Demo, client: redis.Redis, archive: Client
) -> tuple[list[str], float]:
    """What still differs when the flows had AGREE_DEADLINE_S to catch up, and how long it took."""
    expected = proof.expected_balances(demo.settled, demo.top_ups_us)
    started_s = time.monotonic()
    while True:
        ledger = proof.ledger_balances(archive, settings.clickhouse_database)
        differences = proof.disagreements(expected, proof.live_balances(client), ledger)
        waited_s = time.monotonic() - started_s
        if (not differences and _stored(archive, settings.clickhouse_database) >= EVENTS) or (
            waited_s > AGREE_DEADLINE_S
        ):
            return differences, waited_s
        time.sleep(0.1)


def _stored(archive: Client, database: str) -> int:
    [(usage, lifecycle)] = query_rows(
        archive,
        f"SELECT (SELECT count() FROM `{database}`.usage_events FINAL), "
        f"(SELECT count() FROM `{database}`.lifecycle_events FINAL)",
        {},
    )
    return int(usage) + int(lifecycle)


def _earnings_table(archive: Client, database: str) -> Table:
    query = (
        "SELECT node_id, utterances, gpu_active_time_ms, credit_us "
        f"FROM {database}.node_earnings ORDER BY credit_us DESC"
    )
    table = Table(title=f"Analyst: {query}", title_justify="left", title_style="italic")
    table.add_column("node")
    for heading in ("utterances", "GPU, ms", "earned, minutes"):
        table.add_column(heading, justify="right")
    for node_id, utterances, gpu_ms, credit_us in query_rows(archive, query, {}):
        table.add_row(node_id, f"{utterances:,}", f"{gpu_ms:,}", minutes_text(credit_us))
    return table


def _counts_table(archive: Client, database: str, demo: Demo) -> Table:
    usage_sent, lifecycle_sent = _distinct_events(demo.lines)
    [(usage, lifecycle, refused)] = query_rows(
        archive,
        f"SELECT (SELECT count() FROM `{database}`.usage_events FINAL), "
        f"(SELECT count() FROM `{database}`.lifecycle_events FINAL), "
        f"(SELECT count() FROM `{database}`.dead_letters FINAL)",
        {},
    )
    table = Table(title="What was sent, and what the usage store has", title_justify="left")
    table.add_column("messages")
    table.add_column("sent", justify="right")
    table.add_column("stored", justify="right")
    table.add_row("distinct usage events", f"{usage_sent:,}", f"{usage:,}")
    table.add_row("distinct lifecycle events", f"{lifecycle_sent:,}", f"{lifecycle:,}")
    table.add_row("repeats", f"{demo.duplicates:,}", "dropped")
    table.add_row("refused, with reason and bytes", f"{len(demo.rejects):,}", f"{refused:,}")
    return table


def _distinct_events(lines: list[bytes]) -> tuple[int, int]:
    """Distinct usage and lifecycle events by identity, among those that are accepted."""
    usage: set[tuple[str, str, str]] = set()
    lifecycle: set[tuple[str, str, str]] = set()
    for line in lines:
        try:
            event = decode_event(line)
        except Rejected:
            continue
        (usage if isinstance(event, Usage) else lifecycle).add((event.scope, event.source, event.id))
    return len(usage), len(lifecycle)


def _say_proof(screen: Screen, demo: Demo, differences: list[str], waited_s: float) -> bool:
    accounts = len(proof.expected_balances(demo.settled, demo.top_ups_us))
    screen.say("")
    if differences:
        screen.say(f"PROOF FAILED: {len(differences)} of {accounts} accounts do not agree:")
        for line in differences:
            screen.say(f"  {line}")
        return False
    screen.say(
        f"PROOF: Redis = ledger = metering settle, to the microsecond, for all {accounts} accounts;\n"
        f"       every before/after chain is whole, all accounts together sum to zero "
        f"({waited_s:.1f} s after the last message)."
    )
    return True
