"""One contract for the archive's ports, which ClickHouse and the in-memory twins must both pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import pytest
from clickhouse_connect.driver.client import Client

from app.migrate import run_migrations
from schemas.events import LifecycleKind
from schemas.ports import Journal, UsageStore
from schemas.records import DeadLetter, FenceMove, LedgerLine, SettlementRecord
from schemas.rows import LifecycleRow, UsageRow
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from sinks.memory import MemoryJournal, MemoryUsageStore
from tests.support import archive
from tests.support.archive import NOON_MS, ledger_line, lifecycle_row, moved_row, settlement, usage_row

DATABASE = "contract"
Row = TypeVar("Row")


@dataclass(frozen=True)
class Archive:
    """Both ports, and what a reader sees behind them, sorted by identity."""

    usage_store: UsageStore
    journal: Journal
    usage: Callable[[], list[UsageRow]]
    counted_usage: Callable[[], list[UsageRow]]
    lifecycle: Callable[[], list[LifecycleRow]]
    dead_letters: Callable[[], list[DeadLetter]]
    lines: Callable[[], list[LedgerLine]]
    settlements: Callable[[], list[SettlementRecord]]
    fence_moves: Callable[[], list[FenceMove]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a migrated database on an embedded server."""
    with archive.clickhouse_server(tmp_path_factory.mktemp("stores")) as url:
        client = archive.connect(url, DATABASE)
        run_migrations(client, DATABASE)
        yield client


@pytest.fixture(params=["memory", "clickhouse"])
def stores(request: pytest.FixtureRequest) -> Archive:
    """Each implementation in turn, empty."""
    if request.param == "memory":
        return _in_memory()
    client = request.getfixturevalue("client")
    archive.empty(client, DATABASE)
    return _in_clickhouse(client)


def _in_memory() -> Archive:
    store, journal = MemoryUsageStore(), MemoryJournal()
    return Archive(
        store,
        journal,
        usage=lambda: sorted(store.stored_usage(), key=_usage_identity),
        counted_usage=lambda: sorted(store.counted_usage(), key=_usage_identity),
        lifecycle=lambda: sorted(store.stored_lifecycle(), key=_lifecycle_identity),
        dead_letters=lambda: sorted(store.stored_dead_letters(), key=_letter_identity),
        lines=journal.stored_lines,
        settlements=journal.stored_settlements,
        fence_moves=journal.stored_fence_moves,
    )


def _in_clickhouse(client: Client) -> Archive:
    return Archive(
        ClickHouseUsageStore(client, DATABASE),
        ClickHouseJournal(client, DATABASE),
        usage=lambda: archive.read_usage(client),
        counted_usage=lambda: archive.read_usage(client, "usage"),
        lifecycle=lambda: archive.read_lifecycle(client),
        dead_letters=lambda: archive.read_dead_letters(client),
        lines=lambda: archive.read_lines(client),
        settlements=lambda: archive.read_settlements(client),
        fence_moves=lambda: archive.read_fence_moves(client),
    )


def _usage_identity(row: UsageRow) -> tuple[str, str, str]:
    return row.usage.scope, row.usage.source, row.usage.id


def _lifecycle_identity(row: LifecycleRow) -> tuple[str, str, str]:
    return row.lifecycle.scope, row.lifecycle.source, row.lifecycle.id


def _letter_identity(letter: DeadLetter) -> tuple[str, int, int]:
    return letter.topic, letter.partition, letter.offset


def test_usage_comes_back_as_it_went_in(stores: Archive) -> None:
    """Every field survives, optional ones absent or present."""
    rows = [
        usage_row("e-1"),
        usage_row("e-2", audio_ms=None, source_lang=None),
        usage_row("e-3", scope="session/s-9", audio_ms=0, asr_time_ms=3_600_000, partition=65_535),
        usage_row("e-4", source="node/\u00fc \u4e2d 'quoted' \\ \t", offset=2**48 - 1),
    ]
    stores.usage_store.insert_usage(rows)
    assert stores.usage() == sorted(rows, key=_usage_identity)


def test_no_rows_are_no_insert(stores: Archive) -> None:
    """An empty batch is accepted and stores nothing."""
    stores.usage_store.insert_usage([])
    stores.usage_store.insert_lifecycle([])
    stores.usage_store.insert_dead_letters([])
    stores.journal.insert_lines([])
    stores.journal.insert_settlements([])
    stores.journal.insert_fence_moves([])
    assert stores.usage() == [] and stores.lines() == []


@pytest.mark.parametrize("time_ms", [-62_135_596_800_000, -1, 0, 253_402_300_799_999])
def test_usage_of_any_year_is_kept(stores: Archive, time_ms: int) -> None:
    """The years 1, 1969, 1970 and 9999 are stored and read like any other."""
    stores.usage_store.insert_usage([usage_row(time_ms=time_ms, appended_at_ms=NOON_MS)])
    assert [row.usage.time_ms for row in stores.usage()] == [time_ms]


def test_batch_over_a_hundred_months_is_one_insert(stores: Archive) -> None:
    """The number of months in a batch is not limited to the 100 that the server allows by default."""
    month_ms = 31 * 86_400_000
    rows = [usage_row(f"e-{n}", time_ms=1_577_836_800_000 + n * month_ms) for n in range(101)]
    stores.usage_store.insert_usage(rows)
    assert len(stores.usage()) == 101


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 7), (0, 8)), ((0, 7), (1, 0)), ((1, 0), (0, 2**48 - 1)), ((2, 5), (2, 5))],
)
def test_earliest_occurrence_counts_in_either_order(
    stores: Archive, first: tuple[int, int], second: tuple[int, int]
) -> None:
    """The smallest (partition, offset) counts, partition first, whatever came first."""
    row = usage_row()
    occurrences = [
        moved_row(row, partition=partition, offset=offset, cost_us=offset)
        for partition, offset in (first, second)
    ]
    earliest = min(occurrences, key=lambda row: (row.partition, row.offset))
    for batch in (occurrences, occurrences[::-1]):
        for occurrence in batch:
            stores.usage_store.insert_usage([occurrence])
        assert stores.usage() == [earliest]


def test_occurrences_years_apart_are_one_identity(stores: Archive) -> None:
    """The same identity with different times lies in different months and still counts once."""
    late = usage_row(time_ms=NOON_MS, offset=5)
    early = usage_row(time_ms=NOON_MS - 400 * 86_400_000, offset=9)
    stores.usage_store.insert_usage([early])
    stores.usage_store.insert_usage([late])
    assert stores.usage() == [late]


def test_identity_is_scope_source_and_id(stores: Archive) -> None:
    """Rows that differ in any part of the identity are different events."""
    rows = [
        usage_row("a", source="x", scope="room/r-1"),
        usage_row("a", source="x", scope="session/r-1"),
        usage_row("a", source="y", scope="room/r-1"),
        usage_row("b", source="x", scope="room/r-1"),
    ]
    stores.usage_store.insert_usage(rows)
    assert len(stores.usage()) == 4


def test_usage_loses_its_identity_to_an_earlier_lifecycle_event(stores: Archive) -> None:
    """Only an earlier lifecycle event of the very same identity takes usage out of the count."""
    usage = [usage_row(f"e-{n}", source="x", offset=10) for n in range(4)]
    stores.usage_store.insert_usage(usage)
    stores.usage_store.insert_lifecycle(
        [
            lifecycle_row("e-0", source="x", offset=9),
            lifecycle_row("e-1", source="x", offset=11),
            lifecycle_row("e-2", source="y", offset=9),
            lifecycle_row("e-3", source="x", offset=9, scope="room/r-2"),
        ]
    )
    assert [row.usage.id for row in stores.counted_usage()] == ["e-1", "e-2", "e-3"]
    assert len(stores.usage()) == 4


def test_lifecycle_events_come_back_and_the_earliest_counts(stores: Archive) -> None:
    """Every kind survives; a repeat replaces by the same rule as usage."""
    rows = [lifecycle_row(f"e-{kind:d}", kind=kind, offset=5) for kind in LifecycleKind]
    stores.usage_store.insert_lifecycle(rows)
    stores.usage_store.insert_lifecycle([lifecycle_row("e-1", kind=LifecycleKind.LEFT, offset=6)])
    assert stores.lifecycle() == rows
    earlier = lifecycle_row("e-1", kind=LifecycleKind.LEFT, offset=4)
    stores.usage_store.insert_lifecycle([earlier])
    assert stores.lifecycle() == [earlier, *rows[1:]]


def test_dead_letters_keep_their_original_bytes(stores: Archive) -> None:
    """Bytes that are no text, empty ones and none at all come back as they were."""
    letters = [
        DeadLetter(
            topic="lingua.events",
            partition=0,
            offset=offset,
            reason="not_json",
            detail="a quote: '\u4e2d'",
            key=key,
            value=value,
            appended_at_ms=NOON_MS,
        )
        for offset, (key, value) in enumerate(
            [(None, None), (b"", b""), (b"room/r-1", b"\x00\xff{\n'\\"), (b"k", bytes(range(256)))]
        )
    ]
    stores.usage_store.insert_dead_letters(letters)
    stores.usage_store.insert_dead_letters(letters[::-1])
    assert stores.dead_letters() == letters


def test_line_of_the_highest_epoch_counts_in_either_order(stores: Archive) -> None:
    """A number that a rebuilt Redis used again belongs to the newer epoch."""
    old = ledger_line("user/u-1", 7, -5, epoch=1, posted_at_ms=NOON_MS + 40 * 86_400_000)
    new = ledger_line("user/u-1", 7, -9, epoch=2)
    for lines in ([old, new], [new, old]):
        for line in lines:
            stores.journal.insert_lines([line])
        assert stores.lines() == [new]


def test_lines_come_back_with_64_bit_amounts(stores: Archive) -> None:
    """Amounts beyond 2^53 survive to the microsecond, as does every other field."""
    line = ledger_line(
        "user/u-1",
        1,
        -(2**53) - 1,
        2**62,
        reason="resettle",
        request_id="q-1",
        cell_id=f"room/r-1@{NOON_MS}",
        revision=2**53 + 1,
        scope="room/r-1",
        room_id="r-1",
        rate_version="1970-01-01T00:00:00.000Z,2026-01-01T00:00:00.000Z",
        actor="operator \u00e9",
        note="it's \\ a\nnote",
    )
    stores.journal.insert_lines([line])
    assert stores.lines() == [line]


def test_settlement_of_the_highest_revision_counts(stores: Archive) -> None:
    """A scope that was reopened and ended again has one record, the later one, in either order."""
    first, second = settlement("room/r-1", 5, reason="timeout"), settlement("room/r-1", 9)
    for records in ([first, second], [second, first]):
        for record in records:
            stores.journal.insert_settlements([record])
        assert stores.settlements() == [second]


def test_fence_moves_are_a_set(stores: Archive) -> None:
    """Each distinct move is kept once."""
    moves = [
        FenceMove(frozen_before_ms=NOON_MS, epoch=1, moved_at_ms=NOON_MS + 1),
        FenceMove(frozen_before_ms=NOON_MS + 60_000, epoch=1, moved_at_ms=NOON_MS + 1),
        FenceMove(frozen_before_ms=NOON_MS + 60_000, epoch=2, moved_at_ms=NOON_MS + 2),
    ]
    stores.journal.insert_fence_moves(moves)
    stores.journal.insert_fence_moves(moves[1:])
    assert stores.fence_moves() == moves


@pytest.mark.parametrize("seed", range(2))
def test_replays_in_other_batches_change_nothing(stores: Archive, seed: int) -> None:
    """Rows with repeats and conflicts, cut into batches at random and sent again, end in the same state."""
    chance = random.Random(seed)
    usage = [
        usage_row(
            f"e-{chance.randrange(60)}", offset=offset, cost_us=offset, time_ms=NOON_MS + offset * 10**9
        )
        for offset in range(200)
    ]
    lines = [
        ledger_line("user/u-1", chance.randrange(1, 40), -epoch, epoch=epoch)
        for epoch in (1, 2)
        for _ in range(60)
    ]
    expected_usage = {row.usage.id: row for row in reversed(usage)}
    expected_epochs = {
        line.seq: max(other.epoch for other in lines if other.seq == line.seq) for line in lines
    }
    for _ in range(2):
        for batch in _random_batches(usage, chance):
            stores.usage_store.insert_usage(batch)
        for line_batch in _random_batches(lines, chance):
            stores.journal.insert_lines(line_batch)
        assert stores.usage() == sorted(expected_usage.values(), key=_usage_identity), f"seed {seed}"
        assert {line.seq: line.epoch for line in stores.lines()} == expected_epochs, f"seed {seed}"


def _random_batches(rows: list[Row], chance: random.Random) -> list[list[Row]]:
    shuffled = chance.sample(rows, k=len(rows))
    cuts = [0, *sorted(chance.sample(range(1, len(rows)), k=4)), len(rows)]
    return [shuffled[start:end] for start, end in pairwise(cuts)]
