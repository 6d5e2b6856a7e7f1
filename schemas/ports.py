"""The ports through which the flows write to the archive, so that a flow runs alike on servers and on lists.

Every insert is idempotent: the same rows again, in any grouping and any order, change nothing that a reader
sees. An insert returns once the rows are stored for good, blocks while the store is away (it retries for ever
and never drops), and raises at once when retrying cannot help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
from schemas.rows import LifecycleRow, StoredUpTo, UsageRow


class StoreRefused(Exception):
    """The store cannot take the rows and trying again cannot help: one clear line says why."""


class Interrupted(Exception):
    """The process was asked to stop while it waited for a store; the rows may or may not be stored."""


class UsageStore(Protocol):
    """Keeps what was reported. Of an identity's occurrences the smallest (partition, offset) counts.

    All methods block, retry for ever, and raise `StoreRefused` or `Interrupted`; no rows is no call.
    """

    def insert_usage(self, rows: Sequence[UsageRow]) -> None:
        """Store priced usage."""

    def insert_lifecycle(self, rows: Sequence[LifecycleRow]) -> None:
        """Store lifecycle events; they share identities with usage."""

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Store refused messages; identity is the original's (topic, log, partition, offset)."""

    def insert_positions(self, positions: Sequence[StoredUpTo]) -> None:
        """Say how far the store is; only after everything before was stored."""


class Journal(Protocol):
    """Keeps what the outbox reports: balance changes, ends of scopes, moves of the fence.

    All methods block, retry for ever, and raise `StoreRefused` or `Interrupted`; no rows is no call.
    """

    def insert_lines(self, lines: Sequence[LedgerLine]) -> None:
        """Store ledger lines; of equal (account, seq) the highest epoch counts."""

    def insert_settlements(self, settlements: Sequence[SettlementRecord]) -> None:
        """Store ends of scopes; of a scope's the highest revision counts."""

    def insert_fence_moves(self, moves: Sequence[FenceMove]) -> None:
        """Store moves of the fence; each distinct move counts once."""

    def insert_requests(self, requests: Sequence[RequestRecord]) -> None:
        """Store results of money commands; of a request id's the first entry counts."""

    def insert_floors(self, floors: Sequence[FloorRecord]) -> None:
        """Store floors; of an account's the last entry counts."""

    def insert_grants(self, grants: Sequence[GrantRecord]) -> None:
        """Store grants; of a grant id's the last epoch counts."""

    def insert_position(self, position: OutboxPosition) -> None:
        """Say how far the journal is; only after every row of the entries before was stored."""
