"""What every archive tells the repairs, whether it is ClickHouse or the twin in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Protocol

import pytest
from clickhouse_connect.driver.client import Client

import sources.archive
from app.migrate import run_migrations
from flows.usage_store import row_of
from metering.facts import ScopeFacts
from metering.grants import EXPIRED, Grant
from metering.live import Located
from metering.money import REVENUE
from metering.ports import Archive
from metering.rebuild import LedgerArchive
from metering.resettle import corrections, recompute
from metering.settle import Settling
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.messages import RawMessage
from schemas.ports import Journal, UsageStore
from schemas.rate_card import RateCard, RateVersion
from schemas.records import FenceMove, FloorRecord, GrantRecord, OutboxPosition
from schemas.rejections import Rejected
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from sinks.memory import MemoryArchive, MemoryJournal, MemoryUsageStore
from sources.archive import EVER_MS, ClickHouseArchive
from tests.support.archive import NOON_MS, connect, empty, ledger_chain, ledger_line
from tests.support.services import Services

DATABASE = "repairs"
MONTH_MS = 30 * 86_400_000
CARD = RateCard(
    versions=(
        RateVersion(effective_from_ms=0, asr=1000, nmt=1000, tts=1000, node_credit=500),
        RateVersion(effective_from_ms=NOON_MS + 90_000, asr=7, nmt=11, tts=13, node_credit=3),
    )
)


class Bench(Protocol):
    """An archive with the stores that fill it, empty."""

    usage_store: UsageStore
    journal: Journal

    def archive(self, log: str = "log-1") -> RepairArchive: ...


class RepairArchive(Archive, LedgerArchive, Protocol):
    """What resettle and rebuild read, together."""

    def last_entry(self) -> tuple[int, int]: ...


class MemoryBench:
    def __init__(self) -> None:
        self.usage_store = MemoryUsageStore()
        self.journal = MemoryJournal()

    def archive(self, log: str = "log-1") -> RepairArchive:
        return MemoryArchive(self.usage_store, self.journal, "lingua.events", lambda: log)


class ClickHouseBench:
    def __init__(self, client: Client) -> None:
        empty(client, DATABASE)
        self.client = client
        self.usage_store = ClickHouseUsageStore(client, DATABASE)
        self.journal = ClickHouseJournal(client, DATABASE)

    def archive(self, log: str = "log-1") -> RepairArchive:
        return ClickHouseArchive(self.client, DATABASE, CARD, "lingua.events", log)


@pytest.fixture(scope="module")
def client(services: Services) -> Client:
    """A migrated database of its own."""
    client = connect(services.clickhouse, DATABASE)
    run_migrations(client, DATABASE)
    return client


@pytest.fixture(params=["memory", "clickhouse"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Each archive in turn, empty."""
    return MemoryBench() if request.param == "memory" else ClickHouseBench(request.getfixturevalue("client"))


def an_event(chance: random.Random) -> Event:
    """Few names and few instants, so that identities clash, rates change and members come and go."""
    scope = chance.choice(["room/r-1", "room/r-2", "session/s-1"])
    kind, _, name = scope.partition("/")
    source, id = chance.choice(["node/n-1", "both"]), f"e-{chance.randrange(40)}"
    time_ms = NOON_MS + chance.randrange(-2, 4) * 60_000 + chance.choice([0, 29_999, 30_000, 59_999])
    time_ms -= chance.choice([0, 0, 0, 2 * MONTH_MS])
    user = f"u-{chance.randrange(4)}"
    room = name if kind == "room" else None
    if room is not None and source == "both" and chance.random() < 0.6:
        event_kind = chance.choice([LifecycleKind.JOINED, LifecycleKind.LEFT, LifecycleKind.CLOSED])
        member = None if event_kind is LifecycleKind.CLOSED else user
        return Lifecycle(scope, source, id, time_ms, event_kind, member, None, room)
    stages = [chance.randrange(1_000) for _ in range(3)]
    gpu = chance.randrange(sum(stages) + 1)
    session = "s-1" if room is None else "s-9"
    node = f"n-{chance.randrange(3)}"
    return Usage(scope, source, id, time_ms, session, room, user, node, "ut", None, *stages, gpu, None, None)


def store(bench: Bench, located: list[Located]) -> None:
    """In two inserts of any order, one of them repeated."""
    rows = [row_of(one, CARD) for one in located]
    usage_store = bench.usage_store
    for part in (rows[::2], rows[1::2], rows[::2]):
        usage_store.insert_usage([row for row in part if isinstance(row, UsageRow)])
        usage_store.insert_lifecycle([row for row in part if isinstance(row, LifecycleRow)])


def settled(events: list[Event]) -> dict[tuple[str, int], dict[str, int]]:
    """The pure function's cells."""
    settling = Settling(CARD)
    for event in events:
        try:
            settling.add(event)
        except Rejected:
            continue
    return {(scope, start): vector for scope, start, vector, _ in settling.vectors()}


def recomputed(chunks: Iterator[list[ScopeFacts]]) -> dict[tuple[str, int], dict[str, int]]:
    return {
        (facts.scope, start): cell.vector
        for chunk in chunks
        for facts in chunk
        for start, cell in recompute(facts, CARD).items()
    }


@pytest.mark.parametrize("seed", range(12))
def test_recomputed_cells_are_those_of_the_pure_function(
    bench: Bench, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever clashes, repeats, order of inserts, months and versions of the rates; range by range."""
    monkeypatch.setattr(sources.archive, "USAGE_ROWS_AT_ONCE", 1 + seed * 20)
    chance = random.Random(seed)
    events = [an_event(chance) for _ in range(150)]
    located = [
        Located(event, RawMessage("lingua.events", number // 75, number % 75, None, b"", NOON_MS))
        for number, event in enumerate(events)
    ]
    shuffled = list(located)
    chance.shuffle(shuffled)
    store(bench, shuffled)
    found = recomputed(bench.archive().facts_since(EVER_MS, NOON_MS + MONTH_MS))
    assert found == settled(events)


def test_windows_end_before_the_fence_and_begin_at_since(bench: Bench) -> None:
    """A window that starts at the fence is live; one that starts at `since` is compared."""
    chance = random.Random(1)
    events = [an_event(chance) for _ in range(100)]
    store(
        bench,
        [
            Located(event, RawMessage("lingua.events", 0, offset, None, b"", NOON_MS))
            for offset, event in enumerate(events)
        ],
    )
    found = recomputed(bench.archive().facts_since(NOON_MS, NOON_MS + 60_000))
    expected = {key: cell for key, cell in settled(events).items() if key[1] == NOON_MS}
    assert found == expected


def test_what_the_ledger_has_too_much_is_taken_back(bench: Bench) -> None:
    """A cell without usage goes to zero; what is right is left alone, and lines of no cell too."""
    cell = f"room/r-1@{NOON_MS}"
    journal = bench.journal
    about = {"cell_id": cell, "scope": "room/r-1", "entry": 1}
    journal.insert_lines(ledger_chain("user/u-1", [-70, 10], **about))
    journal.insert_lines(ledger_chain(REVENUE, [70, -10], **about))
    journal.insert_lines([ledger_line("user/u-2", 1, 500, entry=1)])
    [[facts]] = bench.archive().facts_since(EVER_MS, NOON_MS + 60_000)
    [correction] = corrections(facts, CARD, NOON_MS + 60_000)
    assert (correction.cell_id, correction.changes) == (cell, {"user/u-1": 60})
    assert corrections(facts, CARD, NOON_MS) == []


def located_at(
    offset: int, time_ms: int, appended_at_ms: int, scope: str = "session/s-1", id: str = ""
) -> Located:
    _, _, name = scope.partition("/")
    usage = Usage(
        scope, "node/n-1", id or f"e-{offset}", time_ms, name, None, "u-1", "n-1", "ut", None,
        10, 0, 0, 0, None, None,
    )  # fmt: skip
    return Located(usage, RawMessage("lingua.events", 0, offset, None, b"", appended_at_ms))


def test_only_what_may_have_changed_is_read(bench: Bench) -> None:
    """Late usage brings all of its scope; what froze lately comes from there on; the rest stays away."""
    done_ms, fence_ms = NOON_MS + 120_000, NOON_MS + 240_000
    hour = 3_600_000
    store(
        bench,
        [
            located_at(0, NOON_MS, NOON_MS, "session/old"),
            located_at(1, NOON_MS, NOON_MS, "session/late"),
            located_at(2, NOON_MS + 60_000, NOON_MS + hour, "session/late"),
            located_at(3, NOON_MS, NOON_MS, "session/frozen-lately"),
            located_at(4, done_ms, NOON_MS, "session/frozen-lately"),
            located_at(5, fence_ms, NOON_MS + hour, "session/live"),
        ],
    )
    chunks = list(bench.archive().facts_changed(NOON_MS + hour, done_ms, fence_ms))
    found = {facts.scope: facts for chunk in chunks for facts in chunk}
    assert set(found) == {"session/late", "session/frozen-lately"}, "the live one has no frozen cell"
    assert found["session/late"].from_window_ms == EVER_MS
    assert {usage.window_start_ms for usage in found["session/late"].usage} == {NOON_MS, NOON_MS + 60_000}
    assert found["session/frozen-lately"].from_window_ms == done_ms
    everything = list(bench.archive().facts_changed(0, 0, fence_ms))
    assert {facts.scope for chunk in everything for facts in chunk} == {*found, "session/old"}


def test_positions_are_those_of_the_log_that_is_read_and_never_go_back(bench: Bench) -> None:
    """A repeat after a crash says less; another log says nothing about this one."""
    usage_store = bench.usage_store
    usage_store.insert_positions([StoredUpTo("lingua.events", "log-1", 0, 9, NOON_MS)])
    usage_store.insert_positions([StoredUpTo("lingua.events", "log-1", 0, 4, NOON_MS)])
    usage_store.insert_positions([StoredUpTo("lingua.events", "log-0", 1, 99, NOON_MS)])
    assert bench.archive().stored_offsets() == {0: 9}


def test_lines_that_a_rebuild_voided_count_nowhere(bench: Bench) -> None:
    """An older epoch's line after the entry that the rebuild went on from, however late it arrives."""
    journal = bench.journal
    cell = {"cell_id": f"session/s-1@{NOON_MS}", "scope": "session/s-1"}
    journal.insert_lines(
        [
            ledger_line("user/u-1", 1, -70, entry=5, epoch=1, **cell),
            ledger_line("user/u-1", 2, -1, before_us=-70, entry=6, epoch=1, **cell),
            ledger_line("user/u-1", 3, -1, before_us=-71, entry=7, epoch=1, **cell),
        ]
    )
    bench.archive().record_epoch(2, 5)
    journal.insert_lines([ledger_line("user/u-1", 2, -5, before_us=-70, entry=6, epoch=2, **cell)])
    [[facts]] = bench.archive().facts_since(EVER_MS, NOON_MS + 60_000)
    assert facts.posted == {NOON_MS: {"user/u-1": -75}}
    [[account]] = list(bench.archive().accounts())
    assert account == ("user/u-1", -75, 2, None, ())
    assert bench.archive().newest_epoch() == 2
    assert bench.archive().last_entry()[0] == 6


def test_accounts_come_with_what_is_left_of_their_grants(bench: Bench) -> None:
    """Not with expired ones, and not with what a rebuild voided."""
    journal = bench.journal
    moves = [(100, "g-1", {"g-1": 100}), (50, "g-2", {"g-2": 50}), (-30, "", {"g-1": -20, "g-2": -10})]
    moves += [(-40, f"{EXPIRED}g-2", {"g-2": -40}), (-7, "", {"g-1": -7})]
    balance_us, lines = 0, []
    for seq, (change_us, request_id, grants) in enumerate(moves, 1):
        told = {"entry": seq, "epoch": 1, "request_id": request_id, "grants": grants}
        lines.append(ledger_line("user/u-1", seq, change_us, before_us=balance_us, **told))
        balance_us += change_us
    journal.insert_lines(lines)
    terms = {"account": "user/u-1", "priority": 3, "from_ms": 5, "expires_ms": 9, "note": "", "epoch": 1}
    journal.insert_grants(
        [
            GrantRecord(grant_id=f"g-{entry}", amount_us=amount_us, entry=entry, granted_at_ms=0, **terms)
            for entry, amount_us in ((1, 100), (2, 50), (9, 70))
        ]
    )
    bench.archive().record_epoch(2, 4)
    [[account]] = list(bench.archive().accounts())
    assert account == ("user/u-1", 80, 4, None, (Grant("g-1", 3, 5, 9, 100, 80),))


def position(epoch: int, entry: int) -> OutboxPosition:
    return OutboxPosition(epoch=epoch, entry=entry, at_ms=0)


def test_an_entry_is_complete_when_it_was_said_so(bench: Bench) -> None:
    """Rows may be there of an entry whose other rows, in another table, are not. A voided word counts no more."""
    journal = bench.journal
    assert bench.archive().last_complete_entry() == 0
    journal.insert_lines([ledger_line("user/u-1", 1, -70, entry=1), ledger_line(REVENUE, 1, 70, entry=1)])
    assert bench.archive().last_complete_entry() == 0
    journal.insert_position(position(epoch=1, entry=1))
    assert bench.archive().last_complete_entry() == 1
    bench.archive().record_epoch(2, 1)
    journal.insert_position(position(epoch=1, entry=5))
    assert bench.archive().last_complete_entry() == 1
    journal.insert_position(position(epoch=2, entry=3))
    assert bench.archive().last_complete_entry() == 3


def test_the_highest_fence_is_known_whoever_moved_it(bench: Bench) -> None:
    """Also one of an older epoch that a rebuild voided: the flows may remember it."""
    assert bench.archive().last_fence_ms() == 0
    moves = [
        FenceMove(frozen_before_ms=120_000, epoch=1, moved_at_ms=2, entry=9),
        FenceMove(frozen_before_ms=60_000, epoch=2, moved_at_ms=3, entry=2),
    ]
    bench.journal.insert_fence_moves(moves)
    bench.archive().record_epoch(2, 1)
    assert bench.archive().last_fence_ms() == 120_000


def test_accounts_come_in_parts_with_their_floors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every account once, also one that has nothing but a floor."""
    monkeypatch.setattr(sources.archive, "ACCOUNTS_AT_ONCE", 2)
    journal = bench.journal
    for number in range(5):
        journal.insert_lines(ledger_chain(f"user/u-{number}", [1, number], entry=1))
    floors = (("user/u-1", -5, 1), ("user/u-1", -6, 2), ("user/new", -7, 3))
    journal.insert_floors(
        [
            FloorRecord(account=account, floor_us=floor_us, epoch=1, entry=entry, set_at_ms=0)
            for account, floor_us, entry in floors
        ]
    )
    parts = list(bench.archive().accounts())
    assert sorted(account for part in parts for account in part) == [
        ("user/new", 0, 0, -7, ()),
        ("user/u-0", 1, 2, None, ()),
        ("user/u-1", 2, 2, -6, ()),
        ("user/u-2", 3, 2, None, ()),
        ("user/u-3", 4, 2, None, ()),
        ("user/u-4", 5, 2, None, ()),
    ]
