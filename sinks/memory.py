"""In-memory twins of the stores: what flow tests and simulations run on instead of servers, by the same rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from metering.commands import CommandOutcome, CommandResult
from metering.facts import ScopeFacts, UsageSum
from metering.grants import EXPIRED, Grant, Grants
from metering.ports import WrongRedis
from metering.rebuild import AccountState
from metering.write_off import Transfer, TransferResult
from schemas.events import LifecycleKind
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
from schemas.redis_keys import DEFAULT_FLOOR_US
from schemas.rfc3339 import parse_rfc3339_ms
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow
from sinks.balances_memory import Account, MemoryRedis

Identity = tuple[str, str, str]

EVER_MS = -(2**62)
"""Before every window."""


class MemoryUsageStore:
    """`schemas.ports.UsageStore` in dictionaries. Never blocks, never raises; not thread-safe."""

    def __init__(self) -> None:
        self._usage: dict[Identity, UsageRow] = {}
        self._lifecycle: dict[Identity, LifecycleRow] = {}
        self._dead_letters: dict[tuple[str, str, int, int], DeadLetter] = {}
        self._positions: dict[tuple[str, str, int], int] = {}

    def insert_usage(self, rows: Sequence[UsageRow]) -> None:
        """Keep the earliest occurrence of each identity."""
        for row in rows:
            event = row.usage
            known = self._usage.setdefault((event.scope, event.source, event.id), row)
            if _position(row) <= _position(known):
                self._usage[event.scope, event.source, event.id] = row

    def insert_lifecycle(self, rows: Sequence[LifecycleRow]) -> None:
        """Keep the earliest occurrence of each identity."""
        for row in rows:
            event = row.lifecycle
            known = self._lifecycle.setdefault((event.scope, event.source, event.id), row)
            if _position(row) <= _position(known):
                self._lifecycle[event.scope, event.source, event.id] = row

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keep one letter per original message."""
        for letter in letters:
            self._dead_letters[letter.topic, letter.log, letter.partition, letter.offset] = letter

    def insert_positions(self, positions: Sequence[StoredUpTo]) -> None:
        """Keep the highest offset of each partition of each log."""
        for stored in positions:
            place = (stored.topic, stored.log, stored.partition)
            self._positions[place] = max(self._positions.get(place, 0), stored.next_offset)

    def stored_offsets(self, topic: str, log: str) -> dict[int, int]:
        """Partition -> everything before this offset is stored."""
        return {
            partition: offset
            for (of_topic, of_log, partition), offset in self._positions.items()
            if (of_topic, of_log) == (topic, log)
        }

    def stored_usage(self) -> list[UsageRow]:
        """The earliest occurrence of each identity among usage, in no particular order."""
        return list(self._usage.values())

    def counted_usage(self) -> list[UsageRow]:
        """The same without those that lost their identity to an earlier lifecycle event: the view `usage`."""
        lifecycle = self._lifecycle
        return [row for identity, row in self._usage.items() if not _lost(row, lifecycle.get(identity))]

    def counted_lifecycle(self) -> list[LifecycleRow]:
        """Lifecycle events without those that lost their identity to earlier usage."""
        usage = self._usage
        return [row for identity, row in self._lifecycle.items() if not _lost(row, usage.get(identity))]

    def stored_lifecycle(self) -> list[LifecycleRow]:
        """The earliest occurrence of each identity among lifecycle events, in no particular order."""
        return list(self._lifecycle.values())

    def stored_dead_letters(self) -> list[DeadLetter]:
        """One letter per original message, in no particular order."""
        return list(self._dead_letters.values())


class MemoryJournal:
    """`schemas.ports.Journal` in dictionaries. Never blocks, never raises; not thread-safe."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], LedgerLine] = {}
        self._settlements: dict[str, SettlementRecord] = {}
        self._fence_moves: set[FenceMove] = set()
        self._requests: dict[str, RequestRecord] = {}
        self._floors: dict[str, FloorRecord] = {}
        self._grants: dict[tuple[str, str], GrantRecord] = {}
        self._epochs: set[tuple[int, int]] = set()
        self._positions: set[tuple[int, int]] = set()
        self._entries: dict[tuple[int, int], int] = {}

    def insert_lines(self, lines: Sequence[LedgerLine]) -> None:
        """Keep the line of the highest epoch for each (account, seq)."""
        for line in lines:
            known = self._lines.setdefault((line.account, line.seq), line)
            if line.epoch >= known.epoch:
                self._lines[line.account, line.seq] = line
            self._entries[line.epoch, line.entry] = line.posted_at_ms

    def insert_settlements(self, settlements: Sequence[SettlementRecord]) -> None:
        """Keep the record of the highest revision for each scope."""
        for settlement in settlements:
            known = self._settlements.setdefault(settlement.scope, settlement)
            if settlement.revision >= known.revision:
                self._settlements[settlement.scope] = settlement
            self._entries[settlement.epoch, settlement.entry] = settlement.posted_at_ms

    def insert_fence_moves(self, moves: Sequence[FenceMove]) -> None:
        """Keep each distinct move once."""
        self._fence_moves.update(moves)
        for move in moves:
            self._entries[move.epoch, move.entry] = move.moved_at_ms

    def insert_requests(self, requests: Sequence[RequestRecord]) -> None:
        """Keep the record of the highest epoch for each request."""
        for request in requests:
            known = self._requests.setdefault(request.request_id, request)
            if request.epoch >= known.epoch:
                self._requests[request.request_id] = request
            self._entries[request.epoch, request.entry] = request.posted_at_ms

    def insert_floors(self, floors: Sequence[FloorRecord]) -> None:
        """Keep the last floor of each account."""
        for floor in floors:
            known = self._floors.setdefault(floor.account, floor)
            if (floor.epoch, floor.entry) >= (known.epoch, known.entry):
                self._floors[floor.account] = floor
            self._entries[floor.epoch, floor.entry] = floor.set_at_ms

    def insert_grants(self, grants: Sequence[GrantRecord]) -> None:
        """Keep the record of the highest epoch for each grant."""
        for grant in grants:
            known = self._grants.setdefault((grant.account, grant.grant_id), grant)
            if grant.epoch >= known.epoch:
                self._grants[grant.account, grant.grant_id] = grant
            self._entries[grant.epoch, grant.entry] = grant.granted_at_ms

    def counted_grants(self) -> list[GrantRecord]:
        """The grants that no rebuild voided, in no particular order."""
        return [grant for grant in self._grants.values() if self.counts(grant.epoch, grant.entry)]

    def insert_position(self, position: OutboxPosition) -> None:
        """Note that every entry up to this one is stored whole."""
        self._positions.add((position.epoch, position.entry))

    def complete_entry(self) -> int:
        """The last entry up to which everything is stored whole; 0 without any."""
        stored = (entry for epoch, entry in self._positions if self.counts(epoch, entry))
        return max(max(stored, default=0), max((after for _, after in self._epochs), default=0))

    def record_epoch(self, epoch: int, after_entry: int) -> None:
        """Void what older epochs wrote after this entry."""
        self._epochs.add((epoch, after_entry))

    def counts(self, epoch: int, entry: int) -> bool:
        """Whether what an epoch wrote in this entry was not voided by a rebuild."""
        return not any(rebuilt > epoch and after < entry for rebuilt, after in self._epochs)

    def newest_epoch(self) -> int:
        """The highest epoch of any line or rebuild; 0 without any."""
        lines = max((line.epoch for line in self._lines.values()), default=0)
        return max(lines, max((epoch for epoch, _ in self._epochs), default=0))

    def entries(self) -> dict[int, int]:
        """Number -> time (ms) of every outbox entry that a row came from and that counts."""
        return {entry: at_ms for (epoch, entry), at_ms in self._entries.items() if self.counts(epoch, entry)}

    def counted_lines(self) -> list[LedgerLine]:
        """The lines that no rebuild voided, in no particular order: the view `ledger_lines`."""
        if not self._epochs:
            return list(self._lines.values())
        return [line for line in self._lines.values() if self.counts(line.epoch, line.entry)]

    def counted_requests(self) -> list[RequestRecord]:
        """The results of money commands that no rebuild voided, in no particular order."""
        return [request for request in self._requests.values() if self.counts(request.epoch, request.entry)]

    def counted_floors(self) -> list[FloorRecord]:
        """The floors that no rebuild voided, in no particular order."""
        return [floor for floor in self._floors.values() if self.counts(floor.epoch, floor.entry)]

    def stored_lines(self) -> list[LedgerLine]:
        """The line of the highest epoch for each (account, seq), by account, then seq."""
        return [self._lines[key] for key in sorted(self._lines)]

    def stored_settlements(self) -> list[SettlementRecord]:
        """The record that counts for each scope, by scope."""
        return [self._settlements[scope] for scope in sorted(self._settlements)]

    def stored_fence_moves(self) -> list[FenceMove]:
        """The moves, by the time they were made."""
        return sorted(
            self._fence_moves, key=lambda move: (move.moved_at_ms, move.frozen_before_ms, move.epoch)
        )


class MemoryArchive:
    """`metering.ports.Archive` and `metering.rebuild.LedgerArchive` over the two stores in memory.

    `log()` is the id of the topic's log that is read now. Never blocks, never raises.
    """

    def __init__(
        self, store: MemoryUsageStore, journal: MemoryJournal, topic: str, log: Callable[[], str]
    ) -> None:
        self._store = store
        self._journal = journal
        self._topic = topic
        self._log = log

    def stored_offsets(self) -> Mapping[int, int]:
        return self._store.stored_offsets(self._topic, self._log())

    def facts_since(self, since_ms: int, frozen_before_ms: int) -> Iterator[list[ScopeFacts]]:
        scopes = {row.usage.scope for row in self._store.counted_usage()}
        scopes |= {line.scope for line in self._journal.counted_lines() if line.scope}
        yield self._facts(dict.fromkeys(sorted(scopes), since_ms), frozen_before_ms)

    def facts_changed(
        self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int
    ) -> Iterator[list[ScopeFacts]]:
        if appended_since_ms <= 0:
            yield from self.facts_since(EVER_MS, frozen_before_ms)
            return
        yield self._facts(
            self.changed_scopes(appended_since_ms, frozen_from_ms, frozen_before_ms), frozen_before_ms
        )

    def changed_scopes(
        self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int
    ) -> dict[str, int]:
        """Scope -> first window to compare. A late event may take one of another window back, so that all of its
        scope is compared; what froze only lately is compared from there on."""
        changed: dict[str, int] = {}
        for row in self._store.stored_usage():
            # Also one for a live window: it may have taken the identity of usage in a frozen one.
            if row.appended_at_ms >= appended_since_ms:
                changed[row.usage.scope] = EVER_MS
            elif frozen_from_ms <= row.window_start_ms < frozen_before_ms:
                changed.setdefault(row.usage.scope, frozen_from_ms)
        for event in self._store.stored_lifecycle():
            if event.appended_at_ms >= appended_since_ms:
                changed[event.lifecycle.scope] = EVER_MS
        for line in self._journal.counted_lines():
            if line.scope and frozen_from_ms <= _window_of(line.cell_id) < frozen_before_ms:
                changed.setdefault(line.scope, frozen_from_ms)
        return changed

    def _facts(self, from_windows_ms: Mapping[str, int], frozen_before_ms: int) -> list[ScopeFacts]:
        usage: defaultdict[str, dict[tuple[int, str, str, int], list[int]]] = defaultdict(dict)
        for row in self._store.counted_usage():
            event = row.usage
            first = from_windows_ms.get(event.scope)
            if first is not None and first <= row.window_start_ms < frozen_before_ms:
                rates_from_ms = parse_rfc3339_ms(row.rate_version)
                key = (row.window_start_ms, event.user_id, event.node_id, rates_from_ms)
                sums = usage[event.scope].setdefault(key, [0, 0, 0, 0])
                sums[0] += event.asr_time_ms
                sums[1] += event.nmt_time_ms
                sums[2] += event.tts_time_ms
                sums[3] += event.gpu_active_time_ms
        membership: defaultdict[str, list[tuple[LifecycleKind, str | None, int]]] = defaultdict(list)
        for stored in self._store.counted_lifecycle():
            about = stored.lifecycle
            if about.scope in from_windows_ms and about.kind <= LifecycleKind.CLOSED:
                membership[about.scope].append((about.kind, about.user_id, about.time_ms))
        posted: defaultdict[str, dict[int, dict[str, int]]] = defaultdict(dict)
        for line in self._journal.counted_lines():
            first = from_windows_ms.get(line.scope) if line.scope else None
            if first is not None and first <= (start := _window_of(line.cell_id)) < frozen_before_ms:
                cell = posted[line.scope].setdefault(start, {})
                cell[line.account] = cell.get(line.account, 0) + line.change_us
        return [
            ScopeFacts(
                scope,
                first,
                [UsageSum(*key, *sums) for key, sums in usage[scope].items()],
                membership[scope],
                posted[scope],
            )
            for scope, first in from_windows_ms.items()
            if usage[scope] or posted[scope]
        ]

    def newest_epoch(self) -> int:
        return self._journal.newest_epoch()

    def last_entry(self) -> tuple[int, int]:
        """(number, time in ms) of the last outbox entry that the journal has a row of; zeros for none."""
        return max(self._journal.entries().items(), default=(0, 0))

    def last_complete_entry(self) -> int:
        return self._journal.complete_entry()

    def record_epoch(self, epoch: int, after_entry: int) -> None:
        self._journal.record_epoch(epoch, after_entry)

    def accounts(self) -> Iterator[list[AccountState]]:
        balances: dict[str, tuple[int, int]] = {}
        for line in self._journal.counted_lines():
            balance_us, seq = balances.get(line.account, (0, 0))
            balances[line.account] = (balance_us + line.change_us, max(seq, line.seq))
        floors = {floor.account: floor.floor_us for floor in self._journal.counted_floors()}
        for account in floors:
            balances.setdefault(account, (0, 0))
        grants = self.grants_left()
        yield [
            AccountState(account, balance_us, seq, floors.get(account), tuple(grants.get(account, ())))
            for account, (balance_us, seq) in balances.items()
        ]

    def grants_left(self) -> dict[str, list[Grant]]:
        """The grants of each account that did not expire, with what is left of them."""
        left: defaultdict[tuple[str, str], int] = defaultdict(int)
        expired = set()
        for line in self._journal.counted_lines():
            for grant_id, change_us in line.grants.items():
                left[line.account, grant_id] += change_us
            if line.request_id.startswith(EXPIRED):
                expired.add((line.account, line.request_id.removeprefix(EXPIRED)))
        found: defaultdict[str, list[Grant]] = defaultdict(list)
        for g in self._journal.counted_grants():
            name = (g.account, g.grant_id)
            if name not in expired:
                grant = Grant(g.grant_id, g.priority, g.from_ms, g.expires_ms, g.amount_us, left[name])
                found[g.account].append(grant)
        return dict(found)

    def requests(self) -> Iterator[list[RequestRecord]]:
        yield self._journal.counted_requests()

    def results(self, transfers: Sequence[Transfer]) -> dict[str, TransferResult]:
        """First results of transfers, by request id, that no rebuild can void any more."""
        wanted = {transfer.request_id for transfer in transfers}
        complete = self._journal.complete_entry()
        return {
            request.request_id: TransferResult(request.outcome, request.amount_us, request.balance_us)
            for request in self._journal.counted_requests()
            if request.request_id in wanted and request.entry <= complete
        }

    def last_fence_ms(self) -> int:
        return max((move.frozen_before_ms for move in self._journal.stored_fence_moves()), default=0)

    def last_window_ms(self) -> int | None:
        windows = [row.window_start_ms for row in self._store.stored_usage()]
        windows += [_window_of(line.cell_id) for line in self._journal.counted_lines() if line.cell_id]
        return max(windows, default=None)


def _window_of(cell_id: str) -> int:
    return int(cell_id.rpartition("@")[2])


def _lost(row: UsageRow | LifecycleRow, claim: UsageRow | LifecycleRow | None) -> bool:
    """Whether an identity belongs to an earlier occurrence of the other kind."""
    return claim is not None and _position(claim) < _position(row)


def _position(row: UsageRow | LifecycleRow) -> tuple[int, int]:
    return row.partition, row.offset


class MemoryEmptyBook:
    """`metering.rebuild.EmptyBook` on what the twin of Redis keeps. Never blocks; raises WrongRedis when what is
    being restored is gone again, or somebody else's."""

    def __init__(self, redis: MemoryRedis) -> None:
        self._redis = redis
        self._unrestored: set[str] = set()
        self._coming: int | None = None

    def _check(self) -> None:
        if self._redis.rebuilding is None or self._redis.rebuilding != self._coming:
            raise WrongRedis(f"EPOCH expected {self._coming}, found {self._redis.rebuilding}")

    def newest_epoch(self) -> int:
        return max(self._redis.epoch or 0, self._redis.rebuilding or 0)

    def last_window_ms(self) -> int | None:
        return max((start for start, _ in self._redis.cells.values()), default=None)

    def remove_epoch(self) -> None:
        self._redis.epoch = self._redis.rebuilding = None

    def clear(self, epoch: int, entries: int) -> None:
        redis = self._redis
        redis.outbox.clear()
        redis.last_name = ""
        redis.cells.clear()
        redis.requests.clear()
        redis.request_times.clear()
        redis.request_marks.clear()
        for account in redis.accounts.values():
            account.grants = None
        self._unrestored = set(redis.accounts)
        redis.token = redis.step = redis.done_frozen_before_ms = redis.done_appended_before_ms = 0
        redis.entries = redis.ledger_stored = entries
        redis.rebuilding = self._coming = epoch

    def restore_accounts(self, accounts: Sequence[AccountState]) -> None:
        self._check()
        for name, balance_us, seq, floor_us, grants in accounts:
            floor = DEFAULT_FLOOR_US if floor_us is None else floor_us
            self._redis.accounts[name] = Account(balance_us, seq, floor, Grants(grants) if grants else None)
            self._unrestored.discard(name)

    def restore_requests(self, requests: Sequence[RequestRecord]) -> None:
        self._check()
        for request in requests:
            result = CommandResult(CommandOutcome(request.outcome), request.amount_us, request.balance_us)
            self._redis.requests[request.request_id] = (request.digest, result)
            self._redis.request_times[request.request_id] = (request.posted_at_ms, request.entry)

    def forget_accounts(self) -> int:
        self._check()
        for name in self._unrestored:
            del self._redis.accounts[name]
        forgotten, self._unrestored = len(self._unrestored), set()
        return forgotten

    def announce(self, epoch: int) -> None:
        if self._redis.epoch != epoch:
            self._check()
            self._redis.epoch, self._redis.rebuilding = self._redis.rebuilding, None


class MemoryWriteOffBook:
    """`metering.write_off.WriteOffBook` in dictionaries. Never blocks, never raises."""

    def __init__(self, bound_nodes: Mapping[str, Sequence[str]]) -> None:
        self._bound_nodes = bound_nodes
        self.plans: dict[int, list[Transfer]] = {}
        self.closed: dict[Transfer, TransferResult] = {}

    def bound_nodes(self, user_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {user_id: self._bound_nodes[user_id] for user_id in user_ids if user_id in self._bound_nodes}

    def is_planned(self, period_ms: int) -> bool:
        return period_ms in self.plans

    def plan(self, period_ms: int, transfers: Sequence[Transfer]) -> None:
        self.plans.setdefault(period_ms, list(transfers))

    def open_transfers(self) -> Sequence[Transfer]:
        return [
            transfer
            for _, transfers in sorted(self.plans.items())
            for transfer in transfers
            if transfer not in self.closed
        ]

    def close(self, transfer: Transfer, result: TransferResult) -> None:
        self.closed.setdefault(transfer, result)
