"""In-memory twins of the stores: what flow tests run on instead of servers, by the same rules."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.records import DeadLetter, FenceMove, LedgerLine, SettlementRecord
from schemas.rows import LifecycleRow, UsageRow

Identity = tuple[str, str, str]


class MemoryUsageStore:
    """`schemas.ports.UsageStore` in dictionaries. Never blocks, never raises; not thread-safe."""

    def __init__(self) -> None:
        self._usage: dict[Identity, UsageRow] = {}
        self._lifecycle: dict[Identity, LifecycleRow] = {}
        self._dead_letters: dict[tuple[str, str, int, int], DeadLetter] = {}

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

    def stored_usage(self) -> list[UsageRow]:
        """The earliest occurrence of each identity among usage, in no particular order."""
        return list(self._usage.values())

    def counted_usage(self) -> list[UsageRow]:
        """The same without those that lost their identity to an earlier lifecycle event: the view `usage`."""
        return [row for identity, row in self._usage.items() if not self._lost(identity, row)]

    def stored_lifecycle(self) -> list[LifecycleRow]:
        """The earliest occurrence of each identity among lifecycle events, in no particular order."""
        return list(self._lifecycle.values())

    def stored_dead_letters(self) -> list[DeadLetter]:
        """One letter per original message, in no particular order."""
        return list(self._dead_letters.values())

    def _lost(self, identity: Identity, row: UsageRow) -> bool:
        claim = self._lifecycle.get(identity)
        return claim is not None and _position(claim) < _position(row)


class MemoryJournal:
    """`schemas.ports.Journal` in dictionaries. Never blocks, never raises; not thread-safe."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], LedgerLine] = {}
        self._settlements: dict[str, SettlementRecord] = {}
        self._fence_moves: set[FenceMove] = set()

    def insert_lines(self, lines: Sequence[LedgerLine]) -> None:
        """Keep the line of the highest epoch for each (account, seq)."""
        for line in lines:
            known = self._lines.setdefault((line.account, line.seq), line)
            if line.epoch >= known.epoch:
                self._lines[line.account, line.seq] = line

    def insert_settlements(self, settlements: Sequence[SettlementRecord]) -> None:
        """Keep the record of the highest revision for each scope."""
        for settlement in settlements:
            known = self._settlements.setdefault(settlement.scope, settlement)
            if settlement.revision >= known.revision:
                self._settlements[settlement.scope] = settlement

    def insert_fence_moves(self, moves: Sequence[FenceMove]) -> None:
        """Keep each distinct move once."""
        self._fence_moves.update(moves)

    def stored_lines(self) -> list[LedgerLine]:
        """The lines that count, by account, then seq."""
        return [self._lines[key] for key in sorted(self._lines)]

    def stored_settlements(self) -> list[SettlementRecord]:
        """The record that counts for each scope, by scope."""
        return [self._settlements[scope] for scope in sorted(self._settlements)]

    def stored_fence_moves(self) -> list[FenceMove]:
        """The moves, by the time they were made."""
        return sorted(
            self._fence_moves, key=lambda move: (move.moved_at_ms, move.frozen_before_ms, move.epoch)
        )


def _position(row: UsageRow | LifecycleRow) -> tuple[int, int]:
    return row.partition, row.offset
