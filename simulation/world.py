"""The servers, the clock, and the wire between them and the processes, where every process may die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import TypeVar

import msgspec

from flows.intake import accept_batch
from flows.settlement import SettlementRules
from metering.commands import CommandResult
from metering.facts import Correction
from metering.live import Answer, Emission, Located
from metering.ports import NOTHING_SEEN, CorrectionAnswer, ResettleTicket, SeenEntry, WrongRedis
from metering.rebuild import AccountState
from metering.write_off import Transfer, TransferResult, command_of
from schemas.commands import Command
from schemas.decode import check_append_time, decode_command
from schemas.messages import OutboxMessage, RawMessage
from schemas.rate_card import RateCard, RateVersion
from schemas.records import (
    DeadLetter,
    FenceMove,
    FloorRecord,
    GrantRecord,
    LedgerLine,
    OutboxPosition,
    RequestRecord,
    SettlementRecord,
)
from schemas.rejections import Rejected
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow
from schemas.topics import COMMANDS, EVENTS
from simulation.parts import Parts
from simulation.workload import HOUR_MS, MINUTE_MS, Habits, Producers, Tellers
from sinks.balances_memory import MemoryRedis
from sinks.memory import MemoryEmptyBook, MemoryJournal, MemoryUsageStore, MemoryWriteOffBook

START_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z, the start of a window."""

MOST_IN_FLIGHT = 4

T = TypeVar("T")
Row = TypeVar("Row")


class Died(Exception):
    """A process was killed here."""


class Violation(AssertionError):
    """The books are wrong."""


@dataclass(frozen=True)
class Troubles:
    """How likely what is in one seed; 0 for what it does not know."""

    death: float
    """At each effect; all others are per misfortune."""
    lost_answer: float
    """The call is made again."""
    wipe: float
    roll_back: float
    lost_store: float
    truncation: float
    adoption: float
    wild_fence: float
    race: float
    """That a resettle begins while another runs."""
    abandon: float
    """That a running resettle is left alone for a while, or for good."""
    ledger_away: float
    usage_away: float
    """Of the turns of these flows: how far they lag."""

    @classmethod
    def draw(cls, chance: Random) -> Troubles:
        """Most seeds know a few troubles; a seed with all of them would spend its time on repairs."""

        def share(often: float, *rates: float) -> float:
            return chance.choice(rates) if chance.random() < often else 0.0

        return cls(
            death=share(0.8, 0.01, 0.04, 0.1),
            lost_answer=share(0.5, 0.05, 0.2),
            wipe=share(0.15, 0.2),
            roll_back=share(0.2, 0.5),
            lost_store=share(0.35, 0.3),
            truncation=share(0.25, 0.3),
            adoption=share(0.12, 0.2),
            wild_fence=share(0.3, 0.2, 0.6),
            race=share(0.5, 0.3),
            abandon=share(0.4, 0.2),
            ledger_away=share(0.4, 0.5, 0.9),
            usage_away=share(0.4, 0.5, 0.9),
        )


@dataclass
class Log:
    """The topic of events. `heads` are the first offsets that are left."""

    number: int
    partitions: list[list[RawMessage]]
    heads: list[int]

    @property
    def name(self) -> str:
        """The topic's id."""
        return f"log-{self.number}"

    def ends(self) -> dict[int, int]:
        """As `metering.ports.Log`."""
        return {number: len(messages) for number, messages in enumerate(self.partitions) if messages}


@dataclass
class Recovery:
    """A flow's recovery store: what its last committed epoch knew."""

    log: str
    positions: dict[int, int] = field(default_factory=dict)
    heads_told: set[int] = field(default_factory=set)
    scopes: dict[str, bytes] = field(default_factory=dict)
    commands: list[int] = field(default_factory=lambda: [0])
    """Positions in the topic of commands, the newest last: the flow goes on some commits earlier."""


class World:
    """Everything that outlives a process, and the seed's one source of chance."""

    def __init__(self, seed: int, parts: Parts, tell: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.parts = parts
        self.chance = Random(seed)
        chance = self.chance
        self.tell = tell
        self.points: Counter[str] = Counter()
        self.troubles = Troubles.draw(chance)
        self.faults = True
        self.now_ms = START_MS + chance.randrange(HOUR_MS)
        self.book_clock_ms = chance.choice([0, 0, -4 * MINUTE_MS, 4 * MINUTE_MS])
        """By how much Redis' clock differs from the broker's."""
        self.most_workers = chance.randint(1, 3)
        versions = [RateVersion(0)]
        if chance.random() < 0.3:
            versions = [RateVersion(START_MS - chance.randrange(5 * MINUTE_MS))]
        if chance.random() < 0.5:
            change_ms = self.now_ms + chance.randrange(HOUR_MS)
            versions.append(RateVersion(change_ms, asr=1001, nmt=7, tts=3, node_credit=499))
        self.card = RateCard(versions)
        self.presence_max_ms = chance.choice([3 * MINUTE_MS, HOUR_MS, 12 * HOUR_MS])
        self.emit_interval_ms = chance.choice([0, 200, 5_000])
        self.habits = Habits.draw(chance)
        self.producers = Producers(chance, self.habits)
        self.tellers = Tellers(chance, self.habits.users)
        self.log = self._new_log(0)
        self.known_log = self.log.name
        """The log that revisions are counted in, as Redis knows it: `app.books.check_log`."""
        self.commands: list[RawMessage] = []
        self.redis = MemoryRedis()
        self.usage_store = MemoryUsageStore()
        self.journal = MemoryJournal()
        self.archive = parts.archive(self.usage_store, self.journal, EVENTS, lambda: self.log.name)
        self.recovery = Recovery(self.log.name)
        self.usage_position: dict[int, int] = {}
        self.in_flight: list[tuple[str, Callable[[], object]]] = []
        self.copies: list[tuple[MemoryRedis, int]] = []
        """Redis as it was, and after how many commits of settlement."""
        self.commits = 0
        self.forgotten: set[str] = set()
        """Scopes that the flow has forgotten at some time."""
        self.remembered_epoch = 1
        self.remembered_entry = (1, NOTHING_SEEN)
        self.highest_fence_ms = 0
        self.write_offs = MemoryWriteOffBook(_bound_nodes(self.habits.users))
        self.occurrences: list[tuple[int, int, Located]] = []
        """Every accepted event with its position, of whichever log."""
        self.forgetful: set[str] = set()
        """Rooms whose live state lost membership with a log: what is live of them is exact after a resettle."""
        self.must_notice = False
        """Redis lost what somebody surely knows of: it has to be refused by everybody."""

    # The clock and chance ----------------------------------------------------------------------------

    def book_now_ms(self) -> int:
        """Redis' clock."""
        return self.now_ms + self.book_clock_ms

    def say(self, line: str) -> None:
        """A line of the trace, when there is one."""
        if self.tell is not None:
            self.tell(f"{self.now_ms - START_MS:>10} {line}")

    def maybe(self, share: float) -> bool:
        """True in this share of the cases."""
        return share > 0 and self.chance.random() < share

    def reach(self, point: str) -> None:
        """A place between two effects: the process may die here."""
        if self.faults and self.maybe(self.troubles.death):
            self.points[point] += 1
            self.say(f"died: {point}")
            raise Died(point)

    def call(self, name: str, do: Callable[[], T], *, late: bool = True) -> T:
        """One call of a server. It may never arrive, arrive late, arrive twice, or its answer may be lost."""
        self.now_ms += self.chance.randint(1, 5)
        if not self.faults:
            return do()
        if self.maybe(self.troubles.death):
            if late and self.maybe(0.5) and len(self.in_flight) < MOST_IN_FLIGHT:
                self.in_flight.append((name, do))
                self.points[f"during {name}"] += 1
                self.say(f"died: during {name}")
            else:
                self.points[f"before {name}"] += 1
                self.say(f"died: before {name}")
            raise Died(name)
        answer = do()
        self.reach(f"after {name}")
        if self.maybe(self.troubles.lost_answer):
            self.points[f"answer lost of {name}"] += 1
            self.say(f"answer lost of {name}")
            self.now_ms += self.chance.randint(1, 3_000)
            answer = do()
        return answer

    def land(self) -> None:
        """A call of a process that is dead arrives."""
        if self.in_flight:
            self.now_ms += 1
            name, do = self.in_flight.pop(self.chance.randrange(len(self.in_flight)))
            self.say(f"arrives late: {name}")
            try:
                do()
            except (WrongRedis, ValueError) as error:
                self.say(f"refused: {error}")

    # The topics ---------------------------------------------------------------------------------------

    def _new_log(self, number: int) -> Log:
        count = self.chance.randint(1, 3)
        return Log(number, [[] for _ in range(count)], [0] * count)

    def append_event(self) -> None:
        """One message more on the topic of events."""
        log = self.log
        number, key, value = self.producers.next(self.now_ms, len(log.partitions))
        messages = log.partitions[number]
        appended_at_ms = max(self.now_ms, messages[-1].appended_at_ms if messages else 0)
        message = RawMessage(EVENTS, number, len(messages), key, value, appended_at_ms, None, log.name)
        messages.append(message)
        accepted, _ = accept_batch([message], self.card)
        self.occurrences += [(number, message.offset, located) for located in accepted]
        if self.tell is not None:
            self.say(f"appended {number}/{message.offset}: {accepted[0].event if accepted else 'refused'}")

    def append_command(self) -> None:
        """One message more on the topic of commands, which has one partition."""
        value = self.tellers.next(self.now_ms)
        offset = len(self.commands)
        self.commands.append(RawMessage(COMMANDS, 0, offset, None, value, self.now_ms))
        self.say(f"command {offset}: {value.decode()}")

    def send_transfers(self, transfers: Sequence[Transfer]) -> None:
        """Their commands, at the end of the topic; none of them or all."""
        for transfer in transfers:
            value = command_of(transfer).model_dump_json().encode()
            self.commands.append(RawMessage(COMMANDS, 0, len(self.commands), None, value, self.now_ms))
            self.say(f"command {len(self.commands) - 1}: {transfer}")

    def valid_commands(self) -> Iterator[Command]:
        """Every valid command that was ever given, in the order of the topic."""
        for message in self.commands:
            try:
                command = decode_command(message.value)
                check_append_time(command.time_ms, message.appended_at_ms)
            except Rejected:
                continue
            yield command

    def rules(self) -> SettlementRules:
        """What the settlement flow is given."""
        return SettlementRules(
            self.card,
            self.presence_max_ms,
            5 * MINUTE_MS,
            self.emit_interval_ms,
            revision_base=self.log.number << 40,
        )

    def replace_log(self) -> None:
        """The topic is made anew, with any number of partitions."""
        self.producers.forget_conflicts()
        self.log = self._new_log(self.log.number + 1)

    # Redis --------------------------------------------------------------------------------------------

    def copy_redis(self) -> MemoryRedis:
        """As it is now; entries and results are never changed."""
        found = copy(self.redis)
        found.accounts = {
            name: replace(account, grants=deepcopy(account.grants))
            for name, account in self.redis.accounts.items()
        }
        found.outbox = list(self.redis.outbox)
        found.cells = dict(self.redis.cells)
        found.requests = dict(self.redis.requests)
        found.request_times = dict(self.redis.request_times)
        found.request_marks = dict(self.redis.request_marks)
        return found

    def become(self, other: MemoryRedis) -> None:
        """Redis comes back as it was, in place: whoever is connected goes on with it."""
        for part in fields(MemoryRedis):
            setattr(self.redis, part.name, getattr(other, part.name))


def _bound_nodes(users: int) -> dict[str, list[str]]:
    """Who pays for whom; nobody for one of them."""
    nodes = ["n-0", "n-1", "n-nobody"]
    return {f"u-{number}": nodes[number % 2 :] for number in range(users) if number != 1}


class WiredBook:
    """`metering.ports.BalanceBook` over a wire that fails. One for each process; what it has seen dies with it."""

    def __init__(self, world: World, epoch: int, seen_entry: SeenEntry, name: str) -> None:
        self.world = world
        self.book = world.parts.book(epoch, world.book_now_ms, world.redis, seen_entry)
        self._name = name

    def _call(self, what: str, do: Callable[[], T]) -> T:
        answer = self.world.call(f"{self._name.partition(' ')[0]}: {what}", do)
        self.world.highest_fence_ms = max(self.world.highest_fence_ms, self.world.redis.fence_ms)
        return answer

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        answers: list[list[Answer]] = [[] for _ in emissions]
        for part, places in self._calls(emissions):
            said = self._call("post", lambda part=part: self.book.post(part))  # type: ignore[misc]
            for place, answered in zip(places, said, strict=True):
                answers[place] += answered
        if self.world.tell is not None:
            for emission, said_of_cells in zip(emissions, answers, strict=True):
                for cell, answer in zip(emission.cells, said_of_cells, strict=True):
                    self.world.say(
                        f"{cell.cell_id} revision {cell.revision}: {answer.name} {sorted(cell.amounts.items())}"
                    )
        return answers

    def _calls(self, emissions: Sequence[Emission]) -> list[tuple[list[Emission], list[int]]]:
        """As the real book cuts long lists into calls: between any two cells."""
        chance = self.world.chance
        calls: list[tuple[list[Emission], list[int]]] = [([], [])]
        for place, emission in enumerate(emissions):
            rest = emission.cells
            while len(rest) > 1 and chance.random() < 0.2:
                cut = chance.randrange(1, len(rest))
                part = msgspec.structs.replace(emission, cells=rest[:cut], ending=None)
                rest = rest[cut:]
                calls[-1][0].append(part)
                calls[-1][1].append(place)
                calls.append(([], []))
            calls[-1][0].append(msgspec.structs.replace(emission, cells=rest))
            calls[-1][1].append(place)
        return calls

    def apply_command(self, command: Command) -> CommandResult:
        result = self._call("command", lambda: self.book.apply_command(command))
        self.world.say(f"{command.request_id}: {result}")
        return result

    def expire_grants(self) -> int:
        return self._call("expire", self.book.expire_grants)

    def compact_requests(self, retention_ms: int) -> int:
        return self._call("compact", lambda: self.book.compact_requests(retention_ms))

    def set_floor(self, account: str, floor_us: int) -> None:
        self._call("floor", lambda: self.book.set_floor(account, floor_us))

    def raise_fence(self, frozen_before_ms: int) -> int:
        self.world.say(f"{self._name}: fence to {frozen_before_ms}")
        return self._call("fence", lambda: self.book.raise_fence(frozen_before_ms))

    @property
    def known_fence_ms(self) -> int:
        return self.book.known_fence_ms

    @property
    def seen_entry(self) -> SeenEntry:
        return self.book.seen_entry

    def begin_resettle(self) -> ResettleTicket:
        return self._call("begin", self.book.begin_resettle)

    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        self.world.say(f"{self._name}: token {token} step {step}: {corrections}")
        return self._call("corrections", lambda: self.book.post_corrections(token, step, corrections))

    def end_resettle(self, token: int, frozen_before_ms: int, appended_before_ms: int) -> None:
        self._call("end", lambda: self.book.end_resettle(token, frozen_before_ms, appended_before_ms))

    def stored_entry(self) -> int:
        return self.book.stored_entry()

    def note_stored(self, number: int) -> None:
        self._call("note stored", lambda: self.book.note_stored(number))

    def check_reached(self, number: int) -> None:
        """Refuses a book that never had this entry; notes nothing."""
        self._call("check reached", lambda: self.book._check(SeenEntry(number)))


class WiredOutbox:
    """`metering.ports.Outbox`: notes how far the ledger is, and trims what is stored, or some of it."""

    def __init__(self, book: WiredBook) -> None:
        self._book = book

    def note_stored(self, last: OutboxMessage, number: int) -> int:
        self._book.note_stored(number)
        redis, chance = self._book.world.redis, self._book.world.chance
        keep_from = number if chance.random() < 0.5 else chance.randint(0, number)
        redis.outbox = [entry for entry in redis.outbox if entry.number >= keep_from]
        return len(redis.outbox)

    def set_aside(self, message: OutboxMessage, why: str) -> None:
        raise Violation(f"an entry of the outbox cannot be read: {why}")


class WiredJournal:
    """`schemas.ports.Journal`. An insert that is cut off may have stored its first rows."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _insert(self, what: str, rows: Sequence[Row], insert: Callable[[Sequence[Row]], None]) -> None:
        world = self._world
        if len(rows) > 1 and world.faults and world.maybe(world.troubles.death):
            kept = world.chance.randrange(1, len(rows))
            insert(rows[:kept])
            world.points[f"cut off: {what}"] += 1
            world.say(f"died: {what} cut off after {kept} of {len(rows)} rows")
            raise Died(what)
        world.call(what, lambda: insert(rows))

    def insert_lines(self, lines: Sequence[LedgerLine]) -> None:
        self._insert("ledger: insert lines", lines, self._world.journal.insert_lines)

    def insert_settlements(self, settlements: Sequence[SettlementRecord]) -> None:
        self._insert("ledger: insert settlements", settlements, self._world.journal.insert_settlements)

    def insert_fence_moves(self, moves: Sequence[FenceMove]) -> None:
        self._insert("ledger: insert fence moves", moves, self._world.journal.insert_fence_moves)

    def insert_requests(self, requests: Sequence[RequestRecord]) -> None:
        self._insert("ledger: insert requests", requests, self._world.journal.insert_requests)

    def insert_floors(self, floors: Sequence[FloorRecord]) -> None:
        self._insert("ledger: insert floors", floors, self._world.journal.insert_floors)

    def insert_grants(self, grants: Sequence[GrantRecord]) -> None:
        self._world.call("ledger: grants", lambda: self._world.journal.insert_grants(grants))

    def insert_position(self, position: OutboxPosition) -> None:
        world = self._world
        world.call("ledger: insert position", lambda: world.journal.insert_position(position))


class WiredStore:
    """`schemas.ports.UsageStore`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def insert_usage(self, rows: Sequence[UsageRow]) -> None:
        self._world.call("usage: insert", lambda: self._world.usage_store.insert_usage(rows))

    def insert_lifecycle(self, rows: Sequence[LifecycleRow]) -> None:
        self._world.call("usage: insert lifecycle", lambda: self._world.usage_store.insert_lifecycle(rows))

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        self._world.call(
            "usage: insert letters", lambda: self._world.usage_store.insert_dead_letters(letters)
        )

    def insert_positions(self, positions: Sequence[StoredUpTo]) -> None:
        self._world.call("usage: note stored", lambda: self._world.usage_store.insert_positions(positions))


class WiredEmptyBook:
    """`metering.rebuild.EmptyBook`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._book = MemoryEmptyBook(world.redis)

    def newest_epoch(self) -> int:
        return self._book.newest_epoch()

    def last_window_ms(self) -> int | None:
        return self._book.last_window_ms()

    def remove_epoch(self) -> None:
        self._world.call("rebuild: remove epoch", self._book.remove_epoch, late=False)

    def clear(self, epoch: int, entries: int) -> None:
        self._world.call("rebuild: clear", lambda: self._book.clear(epoch, entries), late=False)

    def restore_accounts(self, accounts: Sequence[AccountState]) -> None:
        self._world.call("rebuild: accounts", lambda: self._book.restore_accounts(accounts), late=False)

    def restore_requests(self, requests: Sequence[RequestRecord]) -> None:
        self._world.call("rebuild: requests", lambda: self._book.restore_requests(requests), late=False)

    def forget_accounts(self) -> int:
        return self._world.call("rebuild: forget", self._book.forget_accounts, late=False)

    def announce(self, epoch: int) -> None:
        def announce() -> None:
            self._book.announce(epoch)
            # Here, and not when its caller hears of it: that one may die first.
            self._world.must_notice = False

        self._world.call("rebuild: announce", announce, late=False)


class WiredWriteOffBook:
    """`metering.write_off.WriteOffBook`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def bound_nodes(self, user_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return self._world.write_offs.bound_nodes(user_ids)

    def is_planned(self, period_ms: int) -> bool:
        return self._world.write_offs.is_planned(period_ms)

    def plan(self, period_ms: int, transfers: Sequence[Transfer]) -> None:
        self._world.call("write-off: plan", lambda: self._world.write_offs.plan(period_ms, transfers))

    def open_transfers(self) -> Sequence[Transfer]:
        return self._world.write_offs.open_transfers()

    def close(self, transfer: Transfer, result: TransferResult) -> None:
        self._world.call("write-off: close", lambda: self._world.write_offs.close(transfer, result))


class LogEnds:
    """`metering.ports.Log` of the log that is there now."""

    def __init__(self, world: World) -> None:
        self._world = world

    def ends(self) -> Mapping[int, int]:
        return self._world.log.ends()
