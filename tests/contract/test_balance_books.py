"""What every balance book does, whether it is Redis with its scripts or the twin in memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering.commands import CommandOutcome, command_digest
from metering.facts import Correction
from metering.grants import MAX_GRANTS
from metering.live import Answer, CellPosting, Emission, Ending
from metering.money import MAX_AMOUNT_US
from metering.outbox import OutboxEntry, parse_entry
from metering.ports import BalanceBook, CorrectionAnswer, WrongRedis
from schemas import redis_keys
from schemas.commands import Command, CommandKind, GrantTerms
from schemas.messages import OutboxMessage
from schemas.records import LedgerLine, SettlementReason
from schemas.redis_keys import LOW_US
from sinks.balances import RedisBalances
from sinks.balances_memory import MemoryBalances
from sinks.outbox import RedisOutbox

START_MS = 1_767_225_600_000


class Bench(Protocol):
    """A book with a view from outside."""

    book: BalanceBook

    def balances(self) -> dict[str, int]: ...

    def entries(self) -> list[OutboxEntry]: ...

    def live_cells(self) -> set[str]: ...

    def set_epoch(self, epoch: int | None, rebuilding: int | None = None) -> None: ...

    def lose_end(self) -> None:
        """Go back to a state with no entry at all, under the same epoch."""

    def note_stored(self, number: int) -> None: ...

    def keep(self) -> Any: ...

    def put_back(self, kept: Any) -> None:
        """Go back to what was kept."""

    def another_book(self) -> BalanceBook:
        """As another process has it, which has seen nothing yet."""

    def trim_all_but_the_last(self) -> None: ...

    def floor_us(self, account: str) -> int: ...


@dataclass
class MemoryBench:
    clock: Iterator[int] = field(default_factory=lambda: count(1))
    book: MemoryBalances = field(init=False)

    def __post_init__(self) -> None:
        self.book = MemoryBalances(now_ms=lambda: next(self.clock))

    def balances(self) -> dict[str, int]:
        return self.book.balances()

    def entries(self) -> list[OutboxEntry]:
        return self.book.outbox

    def live_cells(self) -> set[str]:
        return self.book.live_cells()

    def set_epoch(self, epoch: int | None, rebuilding: int | None = None) -> None:
        self.book.redis.epoch, self.book.redis.rebuilding = epoch, rebuilding

    def lose_end(self) -> None:
        self.book.redis.entries = 0

    def note_stored(self, number: int) -> None:
        self.book.note_stored(number)

    def keep(self) -> Any:
        return deepcopy(self.book.redis)

    def put_back(self, kept: Any) -> None:
        self.book.redis = kept

    def another_book(self) -> BalanceBook:
        return MemoryBalances(1, lambda: next(self.clock), self.book.redis)

    def trim_all_but_the_last(self) -> None:
        del self.book.redis.outbox[:-1]

    def floor_us(self, account: str) -> int:
        return self.book.redis.accounts[account].floor_us


class RedisBench:
    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        client.flushall()
        client.set(redis_keys.EPOCH, 1)
        self.book = RedisBalances(client, epoch=1, outbox_max_entries=1_000_000)

    def balances(self) -> dict[str, int]:
        keys = list(self._client.scan_iter(f"{redis_keys.BALANCE_PREFIX}*"))
        cut = len(redis_keys.BALANCE_PREFIX) + 1
        return {key.decode()[cut:-1]: int(self._client.hget(key, "balance_us") or 0) for key in keys}

    def entries(self) -> list[OutboxEntry]:
        return [parse_entry(fields) for _, fields in self._client.xrange(redis_keys.LEDGER_STREAM)]

    def live_cells(self) -> set[str]:
        cells = {cell.decode() for cell in self._client.zrange(redis_keys.LIVE_CELLS, 0, -1)}
        cut = len(redis_keys.CELL_PREFIX)
        assert cells == {key.decode()[cut:] for key in self._client.scan_iter(f"{redis_keys.CELL_PREFIX}*")}
        return cells

    def set_epoch(self, epoch: int | None, rebuilding: int | None = None) -> None:
        for key, value in ((redis_keys.EPOCH, epoch), (redis_keys.REBUILDING, rebuilding)):
            self._client.delete(key)
            if value is not None:
                self._client.set(key, value)

    def lose_end(self) -> None:
        self._client.delete(redis_keys.ENTRIES)

    def note_stored(self, number: int) -> None:
        outbox = RedisOutbox(self._client, epoch=1, retention_s=3_600, max_entries=1_000_000)
        outbox.note_stored(OutboxMessage(b"0-0", {}), number)

    def keep(self) -> Any:
        return {key: self._client.dump(key) for key in self._client.scan_iter()}

    def put_back(self, kept: Any) -> None:
        self._client.flushall()
        for key, value in kept.items():
            self._client.restore(key, 0, value)

    def another_book(self) -> BalanceBook:
        return RedisBalances(self._client, epoch=1, outbox_max_entries=1_000_000)

    def trim_all_but_the_last(self) -> None:
        self._client.xtrim(redis_keys.LEDGER_STREAM, maxlen=1, approximate=False)

    def floor_us(self, account: str) -> int:
        return int(self._client.hget(redis_keys.balance(account), "floor_us") or 0)


@pytest.fixture(params=["memory", "redis"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Each book in turn, empty."""
    if request.param == "memory":
        yield MemoryBench()
    else:
        yield RedisBench(request.getfixturevalue("redis_client"))


def cell(
    amounts: dict[str, int], revision: int = 1, start_ms: int = START_MS, room: str = "r-1"
) -> CellPosting:
    return CellPosting(f"room/{room}@{start_ms}", start_ms, revision, amounts, "v1")


def emission(*cells: CellPosting, ending: Ending | None = None) -> Emission:
    return Emission("room/r-1", list(cells), ending, [])


def post(bench: Bench, *cells: CellPosting) -> list[Answer]:
    return bench.book.post([emission(*cells)])[0]


def nonzero(balances: dict[str, int]) -> dict[str, int]:
    return {account: amount for account, amount in balances.items() if amount}


def lines_of(bench: Bench) -> list[LedgerLine]:
    return [line for entry in bench.entries() for line in entry.lines]


def assert_chains_are_whole(lines: list[LedgerLine], balances: dict[str, int]) -> None:
    """Each account's lines count from 1, each begins where the last one ended, and the last is the balance."""
    ends: dict[str, tuple[int, int]] = {}
    for line in lines:
        seq, balance_us = ends.get(line.account, (0, 0))
        assert line.seq == seq + 1
        assert line.balance_before_us == balance_us
        assert line.balance_after_us == line.balance_before_us + line.change_us
        ends[line.account] = (line.seq, line.balance_after_us)
    assert {account: balance for account, (_, balance) in ends.items() if balance} == nonzero(balances)


def test_a_posting_moves_every_account_and_revenue_by_the_rest(bench: Bench) -> None:
    """The sum over all accounts is zero."""
    assert post(bench, cell({"user/u-1": -70, "user/u-2": -71, "node/n-1": 40})) == [Answer.POSTED]
    assert nonzero(bench.balances()) == {
        "user/u-1": -70,
        "user/u-2": -71,
        "node/n-1": 40,
        "platform/revenue": 101,
    }


def test_a_higher_revision_posts_the_difference(bench: Bench) -> None:
    """Also for an account that left the split: it goes back to zero."""
    post(bench, cell({"user/u-1": -70, "user/u-2": -70}))
    assert post(bench, cell({"user/u-1": -90, "user/u-3": -50}, revision=5)) == [Answer.POSTED]
    assert nonzero(bench.balances()) == {"user/u-1": -90, "user/u-3": -50, "platform/revenue": 140}
    assert_chains_are_whole(lines_of(bench), bench.balances())


def test_an_older_revision_and_an_equal_one_with_another_vector_are_older(bench: Bench) -> None:
    """An equal revision with the equal vector is posted, to no effect."""
    post(bench, cell({"user/u-1": -70}, revision=5))
    before = len(bench.entries())
    assert post(bench, cell({"user/u-1": -60}, revision=4)) == [Answer.OLDER]
    assert post(bench, cell({"user/u-1": -60}, revision=5)) == [Answer.OLDER]
    assert post(bench, cell({"user/u-1": -70}, revision=5)) == [Answer.POSTED]
    assert len(bench.entries()) == before
    assert bench.balances()["user/u-1"] == -70


def test_a_repeat_of_a_call_whose_answer_was_lost_posts_nothing(bench: Bench) -> None:
    """The same emission again is answered POSTED and appends nothing."""
    post(bench, cell({"user/u-1": -70}), cell({"user/u-1": -5}, start_ms=START_MS + 60_000))
    before = len(bench.entries())
    again = post(bench, cell({"user/u-1": -70}), cell({"user/u-1": -5}, start_ms=START_MS + 60_000))
    assert again == [Answer.POSTED, Answer.POSTED]
    assert len(bench.entries()) == before


def test_windows_before_the_fence_are_frozen_and_forgotten(bench: Bench) -> None:
    """One that starts just before the fence is frozen, one that starts at it is not; the fence never falls."""
    post(bench, cell({"user/u-1": -70}), cell({"user/u-1": -5}, start_ms=START_MS + 60_000))
    assert bench.book.raise_fence(START_MS + 60_000) == START_MS + 60_000
    assert bench.book.raise_fence(START_MS) == START_MS + 60_000
    assert bench.live_cells() == {f"room/r-1@{START_MS + 60_000}"}
    assert post(bench, cell({"user/u-1": -99}, revision=9)) == [Answer.FROZEN]
    assert post(bench, cell({"user/u-1": -6}, 2, START_MS + 60_000)) == [Answer.POSTED]
    assert bench.balances()["user/u-1"] == -76
    moves = [move.frozen_before_ms for entry in bench.entries() for move in entry.fence_moves]
    assert moves == [START_MS + 60_000]


def test_one_call_is_one_entry_with_all_its_lines(bench: Bench) -> None:
    """Lines, in their order, with before and after; and the ending of the scope."""
    ending = Ending(SettlementReason.ENDED, START_MS, START_MS + 9, 3)
    bench.book.post([emission(cell({"user/u-1": -70, "node/n-1": 20}), ending=ending)])
    (entry,) = bench.entries()
    told = [(line.account, line.change_us, line.balance_after_us, line.reason) for line in entry.lines]
    assert told == [
        ("node/n-1", 20, 20, "credit"),
        ("user/u-1", -70, -70, "charge"),
        ("platform/revenue", 50, 50, "revenue"),
    ]
    line = entry.lines[1]
    assert (line.cell_id, line.revision, line.room_id, line.session_id, line.rate_version) == (
        f"room/r-1@{START_MS}", 1, "r-1", "", "v1",
    )  # fmt: skip
    (settlement,) = entry.settlements
    assert (settlement.scope, settlement.reason, settlement.last_event_ms) == (
        "room/r-1",
        "ended",
        START_MS + 9,
    )


def test_a_cell_over_the_limit_is_refused_alone(bench: Bench) -> None:
    """The others of the same call are posted."""
    answers = post(
        bench,
        cell({"user/u-1": -MAX_AMOUNT_US - 1}),
        cell({"user/u-2": -MAX_AMOUNT_US}, room="r-2"),
    )
    assert answers == [Answer.OVER_LIMIT, Answer.POSTED]
    assert nonzero(bench.balances()) == {"user/u-2": -MAX_AMOUNT_US, "platform/revenue": MAX_AMOUNT_US}


def test_balances_beyond_what_a_double_holds_stay_exact(bench: Bench) -> None:
    """Revenue of many cells passes 2**53 and counts on by single microseconds."""
    for number in range(60):
        post(bench, cell({"user/u-1": -(MAX_AMOUNT_US - number)}, room=f"r-{number}"))
    total = 60 * MAX_AMOUNT_US - sum(range(60))
    assert total > 2**57
    assert bench.balances() == {"user/u-1": -total, "platform/revenue": total}
    assert_chains_are_whole(lines_of(bench), bench.balances())


def test_another_epoch_is_refused_and_nothing_is_done(bench: Bench) -> None:
    """An empty or rolled-back Redis cannot pass for the real one."""
    bench.set_epoch(2)
    with pytest.raises(WrongRedis, match="EPOCH expected 1, found 2"):
        post(bench, cell({"user/u-1": -70}))
    with pytest.raises(WrongRedis):
        bench.book.raise_fence(START_MS)
    with pytest.raises(WrongRedis):
        bench.book.apply_command(top_up("q-1", 5))
    assert bench.balances() == {}
    assert bench.entries() == []


def top_up(request_id: str, amount_us: int, account: str = "user/u-1") -> Command:
    return Command(
        CommandKind.TOP_UP, account, amount_us, request_id, "card", "user/u-1", None, "web", "c", 0
    )


def write_off(request_id: str, amount_us: int) -> Command:
    kind = CommandKind.WRITE_OFF
    return Command(kind, "user/u-1", amount_us, request_id, "debt", "system", "node/n-1", "web", "c", 0)


def test_a_command_is_carried_out_once(bench: Bench) -> None:
    """The same request with the same body answers with the first result, with another body it is a conflict."""
    first = bench.book.apply_command(top_up("q-1", 500))
    assert first == (CommandOutcome.APPLIED, 500, 500)
    bench.book.apply_command(top_up("q-2", 7))
    assert bench.book.apply_command(top_up("q-1", 500)) == (CommandOutcome.REPLAYED, 500, 500)
    assert bench.book.apply_command(top_up("q-1", 501)) == (CommandOutcome.CONFLICT, 500, 500)
    assert bench.balances() == {"user/u-1": 507, "platform/top_ups": -507}
    line = lines_of(bench)[0]
    assert (line.request_id, line.reason, line.actor, line.note) == ("q-1", "top_up", "user/u-1", "card")


def test_a_write_off_is_clamped_to_debt_and_credit(bench: Bench) -> None:
    """Never more than the debt, never more than the credit; without either it moves nothing, once and for all."""
    assert bench.book.apply_command(write_off("w-0", 99)) == (CommandOutcome.APPLIED, 0, 0)
    post(bench, cell({"user/u-1": -70, "node/n-1": 40}))
    assert bench.book.apply_command(write_off("w-1", 30)) == (CommandOutcome.APPLIED, 30, -40)
    assert bench.book.apply_command(write_off("w-2", 30)) == (CommandOutcome.APPLIED, 10, -30)
    assert bench.book.apply_command(write_off("w-2", 30)) == (CommandOutcome.REPLAYED, 10, -30)
    assert bench.book.apply_command(write_off("w-0", 99)) == (CommandOutcome.REPLAYED, 0, 0)
    assert nonzero(bench.balances()) == {"user/u-1": -30, "platform/revenue": 30}
    assert_chains_are_whole(lines_of(bench), bench.balances())


def gift(request_id: str, amount_us: int) -> Command:
    """A top-up that a node pays."""
    kind = CommandKind.TOP_UP
    return Command(kind, "user/u-1", amount_us, request_id, "gift", "node/n-1", "node/n-1", "web", "c", 0)


def test_a_node_pays_a_top_up_from_its_credit_or_not_at_all(bench: Bench) -> None:
    """To the last microsecond, and never below zero; what was refused stays refused under its request id."""
    post(bench, cell({"user/u-2": -70, "node/n-1": 40}))
    assert bench.book.apply_command(gift("g-1", 41)) == (CommandOutcome.INSUFFICIENT, 0, 0)
    assert bench.book.apply_command(gift("g-2", 40)) == (CommandOutcome.APPLIED, 40, 40)
    post(bench, cell({"user/u-2": -70, "node/n-1": 40}, room="r-2"))
    assert bench.book.apply_command(gift("g-1", 41)) == (CommandOutcome.INSUFFICIENT, 0, 0)
    assert bench.book.apply_command(gift("g-3", 41)) == (CommandOutcome.INSUFFICIENT, 0, 40)
    assert nonzero(bench.balances()) == {
        "user/u-1": 40, "user/u-2": -140, "node/n-1": 40, "platform/revenue": 60,
    }  # fmt: skip
    assert_chains_are_whole(lines_of(bench), bench.balances())


def test_an_old_request_id_is_spent_for_ever(bench: Bench) -> None:
    """Its result is forgotten once the ledger has it; then a repeat is told from a conflict all the same."""
    bench.book.apply_command(top_up("q-1", 500))
    bench.book.apply_command(top_up("q-2", 7))
    assert bench.book.compact_requests(0) == 0, "the ledger has neither"
    bench.note_stored(1)
    assert bench.book.compact_requests(3_600_000) == 0, "both are young"
    assert bench.book.compact_requests(0) == 1
    assert bench.book.apply_command(top_up("q-1", 500)) == (CommandOutcome.ARCHIVED, 0, 0)
    assert bench.book.apply_command(top_up("q-1", 501)) == (CommandOutcome.CONFLICT, 0, 0)
    assert bench.book.apply_command(top_up("q-2", 7)) == (CommandOutcome.REPLAYED, 7, 507)
    assert bench.balances() == {"user/u-1": 507, "platform/top_ups": -507}


def grant(request_id: str, amount_us: int, terms: tuple[int, int, int], account: str = "user/u-1") -> Command:
    """Minutes for a while: priority, from, expires."""
    kind = CommandKind.GRANT
    told = GrantTerms(*terms)
    return Command(kind, account, amount_us, request_id, "plan", "system", None, "web", "c", 0, told)


def details(bench: Bench) -> list[tuple]:
    return [(line.account, line.change_us, line.grants) for line in lines_of(bench) if line.grants]


def test_a_grant_is_spent_before_the_rest_and_what_is_left_expires(bench: Bench) -> None:
    """The ledger's lines tell how each charge was split; the balance is one number all the while."""
    day_ms = 86_400_000
    end_ms = START_MS + 120_000
    bench.book.apply_command(top_up("q-1", 1_000))
    assert bench.book.apply_command(grant("g-1", 100, (1, START_MS, end_ms))).balance_us == 1_100
    assert bench.book.apply_command(grant("g-2", 10, (0, START_MS, START_MS + day_ms))).balance_us == 1_110
    assert bench.book.apply_command(grant("g-1", 100, (1, START_MS, end_ms))).outcome == "REPLAYED"
    assert bench.book.apply_command(grant("g-1", 100, (2, START_MS, end_ms))).outcome == "CONFLICT"
    post(bench, cell({"user/u-1": -30}))
    post(bench, cell({"user/u-1": -15}, revision=2))
    post(bench, cell({"user/u-1": -40}, start_ms=START_MS - 60_000))
    assert bench.book.expire_grants() == 0
    bench.book.raise_fence(end_ms)
    assert bench.book.expire_grants() == 1
    assert bench.book.expire_grants() == 0
    assert details(bench) == [
        ("user/u-1", 100, {"g-1": 100}),
        ("user/u-1", 10, {"g-2": 10}),
        ("user/u-1", -30, {"g-2": -10, "g-1": -20}),
        ("user/u-1", 15, {"g-1": 15}),
        ("user/u-1", -95, {"g-1": -95}),
    ]
    assert bench.balances()["user/u-1"] == 1_000 - 40
    assert sum(bench.balances().values()) == 0
    assert_chains_are_whole(lines_of(bench), bench.balances())
    last = [line for line in lines_of(bench) if line.request_id == "expired/g-1"]
    assert [(line.account, line.change_us, line.reason) for line in last] == [
        ("user/u-1", -95, "adjustment"),
        ("platform/adjustments", 95, "adjustment"),
    ]
    granted = [record for entry in bench.entries() for record in entry.grants]
    assert [(g.grant_id, g.account, g.priority, g.expires_ms, g.amount_us, g.note) for g in granted] == [
        ("g-1", "user/u-1", 1, end_ms, 100, "plan"),
        ("g-2", "user/u-1", 0, START_MS + day_ms, 10, "plan"),
    ]


def test_what_reads_no_grants_leaves_them(bench: Bench) -> None:
    """A top-up or a floor between the grant and the charge."""
    end_ms = START_MS + 120_000
    bench.book.apply_command(grant("g-1", 100, (0, START_MS, end_ms)))
    bench.book.apply_command(top_up("q-1", 1_000))
    bench.book.set_floor("user/u-1", -7)
    post(bench, cell({"user/u-1": -30}))
    bench.book.raise_fence(end_ms)
    assert bench.book.expire_grants() == 1
    assert [told[1:] for told in details(bench)] == [
        (100, {"g-1": 100}),
        (-30, {"g-1": -30}),
        (-70, {"g-1": -70}),
    ]
    assert bench.balances()["user/u-1"] == 1_000


def test_an_account_has_a_bounded_number_of_grants(bench: Bench) -> None:
    """One more is refused and moves nothing."""
    for number in range(MAX_GRANTS):
        assert bench.book.apply_command(grant(f"g-{number}", 1, (0, 0, START_MS))).outcome == "APPLIED"
    refused = bench.book.apply_command(grant("one-more", 1, (0, 0, START_MS)))
    assert refused == (CommandOutcome.OVER_LIMIT, 0, MAX_GRANTS)
    assert len([record for entry in bench.entries() for record in entry.grants]) == MAX_GRANTS


def fallen(bench: Bench) -> list[tuple]:
    return [
        (alert.account, alert.threshold.value, alert.balance_us, alert.floor_us, alert.seq, alert.entry)
        for entry in bench.entries()
        for alert in entry.alerts
    ]


def test_a_user_who_never_stops_falls_past_each_threshold_once(bench: Bench) -> None:
    """Below ten minutes, below zero, to the floor; further down nobody is told again, and nodes have none."""
    bench.book.apply_command(top_up("q-1", LOW_US + 1))
    for revision, spent in enumerate((1, 2, LOW_US + 1, LOW_US + 2, LOW_US + 9, LOW_US + 18_000_000_001), 1):
        post(bench, cell({"user/u-1": -spent, "node/n-1": spent}, revision))
    floor = -18_000_000_000
    assert fallen(bench) == [
        ("user/u-1", "low", LOW_US - 1, floor, 3, 3),
        ("user/u-1", "zero", -1, floor, 5, 5),
        ("user/u-1", "floor", floor, floor, 7, 7),
    ]
    bench.book.apply_command(top_up("q-2", 1))
    post(bench, cell({"user/u-1": -1}, room="r-2"))
    assert fallen(bench)[3:] == [("user/u-1", "floor", floor, floor, 9, 9)], "above it and down again"


def test_one_posting_may_fall_past_all_thresholds(bench: Bench) -> None:
    """Each is told, of every user, and also when the floor is raised to where the balance is."""
    bench.book.apply_command(top_up("q-1", LOW_US, "user/u-2"))
    bench.book.set_floor("user/u-2", -5)
    post(bench, cell({"user/u-2": -LOW_US - 5, "user/u-1": -3}))
    bench.book.set_floor("user/u-1", -3)
    assert fallen(bench) == [
        ("user/u-1", "zero", -3, -18_000_000_000, 1, 3),
        ("user/u-2", "low", -5, -5, 2, 3),
        ("user/u-2", "zero", -5, -5, 2, 3),
        ("user/u-2", "floor", -5, -5, 2, 3),
        ("user/u-1", "floor", -3, -3, 1, 4),
    ]


def correction(changes: dict[str, int], start_ms: int = START_MS, room: str = "r-1") -> Correction:
    return Correction(f"room/{room}@{start_ms}", start_ms, "v1", changes)


def test_a_resettle_posts_changes_of_frozen_cells_once(bench: Bench) -> None:
    """All or none, against revenue, with the reason `resettle`; a repeated step changes nothing."""
    post(bench, cell({"user/u-1": -70, "node/n-1": 20}))
    bench.book.raise_fence(START_MS + 60_000)
    ticket = bench.book.begin_resettle()
    assert (ticket.token, ticket.frozen_before_ms, ticket.entries) == (1, START_MS + 60_000, 2)
    assert (ticket.done_frozen_before_ms, ticket.done_appended_before_ms) == (0, 0)
    changes = [correction({"user/u-1": 30, "user/u-2": -40}), correction({"user/u-3": -1}, room="r-2")]
    assert bench.book.post_corrections(1, 1, changes) is CorrectionAnswer.POSTED
    assert bench.book.post_corrections(1, 1, changes) is CorrectionAnswer.REPEATED
    assert nonzero(bench.balances()) == {
        "user/u-1": -40, "user/u-2": -40, "user/u-3": -1, "node/n-1": 20, "platform/revenue": 61,
    }  # fmt: skip
    lines = bench.entries()[-1].lines
    assert [(line.account, line.change_us, line.cell_id, line.reason, line.revision) for line in lines] == [
        ("user/u-1", 30, f"room/r-1@{START_MS}", "resettle", 1),
        ("user/u-2", -40, f"room/r-1@{START_MS}", "resettle", 1),
        ("platform/revenue", 10, f"room/r-1@{START_MS}", "resettle", 1),
        ("user/u-3", -1, f"room/r-2@{START_MS}", "resettle", 1),
        ("platform/revenue", 1, f"room/r-2@{START_MS}", "resettle", 1),
    ]
    assert_chains_are_whole(lines_of(bench), bench.balances())


def test_a_newer_token_voids_the_older_ones(bench: Bench) -> None:
    """What an overtaken resettle still wants to post, or to remember, is not done."""
    bench.book.raise_fence(START_MS + 60_000)
    old, new = bench.book.begin_resettle(), bench.book.begin_resettle()
    assert new.token == old.token + 1
    stale = bench.book.post_corrections(old.token, 1, [correction({"user/u-1": -1})])
    assert stale is CorrectionAnswer.STALE
    bench.book.end_resettle(old.token, 7, 8)
    assert bench.balances() == {}
    assert bench.book.begin_resettle()[4:] == (0, 0)


def test_up_to_where_a_resettle_was_complete_is_remembered(bench: Bench) -> None:
    """The next ticket tells it."""
    token = bench.book.begin_resettle().token
    bench.book.end_resettle(token, 120_000, 99)
    ticket = bench.book.begin_resettle()
    assert (ticket.done_frozen_before_ms, ticket.done_appended_before_ms) == (120_000, 99)


def test_a_live_cell_is_never_resettled(bench: Bench) -> None:
    """A window that starts at the fence is live: the call is refused as a whole."""
    bench.book.raise_fence(START_MS + 60_000)
    token = bench.book.begin_resettle().token
    live = correction({"user/u-2": -1}, START_MS + 60_000)
    with pytest.raises((ValueError, redis.ResponseError), match="NOT_FROZEN"):
        bench.book.post_corrections(token, 1, [live])
    assert nonzero(bench.balances()) == {}
    assert bench.book.post_corrections(token, 1, [correction({"user/u-1": -1})]) is CorrectionAnswer.POSTED


def test_a_book_that_lost_its_end_is_refused_by_everyone_from_then_on(bench: Bench) -> None:
    """Whoever saw more entries than there are takes the epoch away, so that nobody else goes on either."""
    post(bench, cell({"user/u-1": -70}))
    bench.lose_end()
    with pytest.raises(WrongRedis, match="EPOCH lost: the outbox has 0 entries, 1 were seen"):
        post(bench, cell({"user/u-1": -80}, revision=2))
    with pytest.raises(WrongRedis, match="EPOCH expected 1, found"):
        bench.book.begin_resettle()
    assert bench.balances()["user/u-1"] == -70


def test_a_book_that_others_went_on_with_after_it_lost_its_end_is_refused_too(bench: Bench) -> None:
    """It has as many entries as somebody saw, but another one in the place of the last."""
    post(bench, cell({"user/u-1": -70}))
    before = bench.keep()
    post(bench, cell({"user/u-1": -80}, revision=2))
    bench.put_back(before)
    other = bench.another_book()
    other.set_floor("user/u-2", -1)
    other.set_floor("user/u-2", -2)
    with pytest.raises(WrongRedis, match=r"EPOCH lost: entry 2 was seen as .*, which is not in the outbox"):
        post(bench, cell({"user/u-1": -90}, revision=3))
    with pytest.raises(WrongRedis, match="EPOCH expected 1, found"):
        other.begin_resettle()


def test_an_entry_that_was_trimmed_is_not_missed(bench: Bench) -> None:
    """Whoever saw it last goes on."""
    post(bench, cell({"user/u-1": -70}))
    other = bench.another_book()
    other.set_floor("user/u-2", -1)
    bench.trim_all_but_the_last()
    assert post(bench, cell({"user/u-1": -80}, revision=2)) == [Answer.POSTED]


def test_while_a_rebuild_is_under_way_only_the_coming_epoch_may_write(bench: Bench) -> None:
    """Whoever knows the old epoch is refused."""
    bench.set_epoch(None, rebuilding=2)
    with pytest.raises(WrongRedis, match="EPOCH expected 1, found 2"):
        post(bench, cell({"user/u-1": -70}))
    bench.set_epoch(None, rebuilding=1)
    assert post(bench, cell({"user/u-1": -70})) == [Answer.POSTED]


def test_what_is_stored_is_noted_and_never_goes_back(bench: Bench) -> None:
    """A number that the outbox never had is a sign of a lost end."""
    post(bench, cell({"user/u-1": -70}))
    post(bench, cell({"user/u-1": -71}, revision=2))
    bench.note_stored(2)
    bench.note_stored(1)
    assert bench.book.stored_entry() == 2
    with pytest.raises(WrongRedis, match="EPOCH lost: the outbox has 2 entries, 3 were seen"):
        bench.note_stored(3)


def test_entries_are_numbered_without_gaps(bench: Bench) -> None:
    """Whatever the script was; what writes nothing has no number."""
    post(bench, cell({"user/u-1": -70}))
    post(bench, cell({"user/u-1": -70}))
    bench.book.apply_command(top_up("q-1", 5))
    bench.book.set_floor("user/u-1", -5)
    bench.book.set_floor("user/u-1", -5)
    bench.book.raise_fence(START_MS)
    assert [entry.number for entry in bench.entries()] == [1, 2, 3, 4]


def test_a_floor_of_its_own_stays(bench: Bench) -> None:
    """It is in the outbox too, and a posting leaves it."""
    bench.book.set_floor("user/u-1", -600)
    post(bench, cell({"user/u-1": -70}))
    assert bench.floor_us("user/u-1") == -600
    (floor,) = bench.entries()[0].floors
    assert (floor.account, floor.floor_us, floor.epoch, floor.entry) == ("user/u-1", -600, 1, 1)
    assert bench.balances()["user/u-1"] == -70


def test_every_command_leaves_its_result_in_the_outbox(bench: Bench) -> None:
    """Also one that moved nothing, since its first result is the one that counts, for ever."""
    command = write_off("w-0", 99)
    bench.book.apply_command(command)
    (entry,) = bench.entries()
    (request,) = entry.requests
    assert entry.lines == []
    told = (request.request_id, request.kind, request.account, request.amount_us, request.outcome)
    assert told == ("w-0", "write_off", "user/u-1", 0, "APPLIED")
    assert request.digest == command_digest(command)


accounts = st.sampled_from(["user/u-1", "user/u-2", "user/u-3", "node/n-1"])
vectors = st.dictionaries(accounts, st.integers(-(10**16), 10**16), max_size=4)
small_vectors = st.dictionaries(accounts, st.integers(-MAX_AMOUNT_US // 4, MAX_AMOUNT_US // 4), min_size=1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.integers(0, 2), st.integers(1, 6), vectors),
        st.tuples(st.just("fence"), st.integers(0, 3)),
        st.tuples(st.just("top_up"), st.integers(0, 3), st.integers(1, MAX_AMOUNT_US)),
        st.tuples(st.just("write_off"), st.integers(4, 6), st.integers(1, MAX_AMOUNT_US)),
        st.tuples(st.just("gift"), st.integers(5, 8), st.integers(1, MAX_AMOUNT_US)),
        st.tuples(st.just("compact"), st.booleans()),
        st.tuples(
            st.just("grant"),
            st.integers(8, 11),
            st.one_of(st.integers(1, MAX_AMOUNT_US), st.integers(1, 10**15)),
            st.tuples(st.integers(0, 1), st.integers(-1, 1), st.integers(2, 3)),
        ),
        st.tuples(st.just("expire")),
        st.tuples(st.just("begin_resettle")),
        st.tuples(st.just("correct"), st.integers(1, 2), st.integers(0, 2), small_vectors),
        st.tuples(st.just("end_resettle"), st.integers(1, 2)),
        st.tuples(st.just("floor"), st.integers(-3, 3)),
    ),
    max_size=18,
)


# Few values and one account, so that short sequences meet in the same grants.
little = st.integers(1, 5)
one_user = st.integers(-5, 5).map(lambda amount: {"user/u-1": amount, "node/n-1": -amount})
operations_on_grants = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.integers(0, 2), st.integers(1, 6), one_user),
        st.tuples(st.just("fence"), st.integers(0, 3)),
        st.tuples(st.just("top_up"), st.integers(0, 1), little),
        st.tuples(st.just("write_off"), st.integers(2, 3), little),
        st.tuples(st.just("compact"), st.booleans()),
        st.tuples(
            st.just("grant"),
            st.integers(4, 8),
            little,
            st.tuples(st.integers(0, 1), st.integers(-1, 1), st.integers(1, 3)),
        ),
        st.tuples(st.just("expire")),
        st.tuples(st.just("begin_resettle")),
        st.tuples(st.just("correct"), st.just(1), st.integers(0, 2), one_user),
    ),
    min_size=4,
    max_size=18,
)


@given(script=st.one_of(operations, operations_on_grants))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_redis_and_its_twin_agree_on_everything(script: list[tuple], redis_client: redis.Redis) -> None:
    """Any sequence of calls gives the same answers, balances, lines and live cells."""
    twins: tuple[Bench, Bench] = (MemoryBench(), RedisBench(redis_client))
    for operation in script:
        first, second = (_carry_out(twin, operation) for twin in twins)
        assert first == second
    memory, server = twins
    assert nonzero(memory.balances()) == nonzero(server.balances())
    assert memory.live_cells() == server.live_cells()
    told = [[line.model_dump(exclude={"posted_at_ms"}) for line in lines_of(twin)] for twin in twins]
    assert told[0] == told[1]
    assert fallen(memory) == fallen(server)
    assert_chains_are_whole(lines_of(server), server.balances())


def _carry_out(twin: Bench, operation: tuple) -> object:  # noqa: PLR0911
    name, *arguments = operation
    if name == "post":
        window, revision, vector = arguments
        return post(twin, cell(vector, revision, START_MS + window * 60_000))
    if name == "fence":
        return twin.book.raise_fence(START_MS + arguments[0] * 60_000)
    if name == "begin_resettle":
        return twin.book.begin_resettle()._replace(at_ms=0)
    if name == "correct":
        token, window, vector = arguments
        changes = {account: amount for account, amount in vector.items() if amount}
        try:
            return twin.book.post_corrections(token, 1, [correction(changes, START_MS + window * 60_000)])
        except (ValueError, redis.ResponseError) as error:
            return str(error).partition(" ")[0]
    if name == "end_resettle":
        return twin.book.end_resettle(arguments[0], START_MS, 5)
    if name == "compact":
        if arguments[0]:
            twin.note_stored(len(twin.entries()))
        return twin.book.compact_requests(0)
    if name == "expire":
        return twin.book.expire_grants()
    if name == "grant":
        request, amount, (priority, first, last) = arguments
        terms = (priority, START_MS + first * 60_000, START_MS + last * 60_000)
        return twin.book.apply_command(grant(f"q-{request}", amount, terms))
    if name == "floor":
        return twin.book.set_floor("user/u-1", arguments[0])
    request, amount = arguments
    make = {"top_up": top_up, "write_off": write_off, "gift": gift}[name]
    return twin.book.apply_command(make(f"q-{request}", amount))
