"""What the write-off flow needs of the accounts: who pays for whom, and which transfers are planned and closed.

All block for as long as the database takes and raise SQLAlchemy's errors when it does not answer; all may be
repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import insert, select, update
from sqlalchemy.engine import CursorResult

from accounts import audit
from accounts.audit import Action, Actor, ActorType
from accounts.database import Database, insert_if_absent
from accounts.models import Binding, WriteOffPeriod, WriteOffTransfer
from metering.money import node_account, user_account
from metering.write_off import Transfer, TransferResult

CHUNK = 1_000
"""Users in one query; SQLite takes 32 766 variables."""


class WriteOffAccounts:
    """`metering.write_off.WriteOffBook` in the accounts database; safe to share between threads."""

    def __init__(self, database: Database, now_ms: Callable[[], int]) -> None:
        self._database = database
        self._now_ms = now_ms

    def bound_nodes(self, user_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """For each of these users who has bound nodes: their ids, the one that pays first first."""
        found: dict[str, list[str]] = {}
        with self._database.read() as session:
            for start in range(0, len(user_ids), CHUNK):
                rows = session.execute(
                    select(Binding.user_id, Binding.node_id)
                    .where(Binding.user_id.in_(user_ids[start : start + CHUNK]))
                    .order_by(Binding.user_id, Binding.position)
                )
                for user_id, node_id in rows:
                    found.setdefault(user_id, []).append(node_id)
        return found

    def is_planned(self, period_ms: int) -> bool:
        """Whether the plan of a period is written down."""
        with self._database.read() as session:
            return session.get(WriteOffPeriod, period_ms) is not None

    def plan(self, period_ms: int, transfers: Sequence[Transfer]) -> None:
        """Write the plan of a period down, whole, unless there is one."""
        with self._database.write() as session:
            period = {"period_ms": period_ms, "planned_at_ms": self._now_ms()}
            if not insert_if_absent(session, WriteOffPeriod, period):
                return
            rows = [
                {
                    "period_ms": period_ms,
                    "position": position,
                    "user_id": transfer.user_id,
                    "node_id": transfer.node_id,
                    "amount_us": transfer.amount_us,
                }
                for position, transfer in enumerate(transfers)
            ]
            if rows:
                session.execute(insert(WriteOffTransfer), rows)

    def open_transfers(self) -> list[Transfer]:
        """Those that were planned and not closed, of all periods, in the order of their plans."""
        kept = WriteOffTransfer
        query = (
            select(kept.period_ms, kept.user_id, kept.node_id, kept.amount_us)
            .where(kept.closed_at_ms.is_(None))
            .order_by(kept.period_ms, kept.position)
        )
        with self._database.read() as session:
            return [Transfer(*row) for row in session.execute(query)]

    def close(self, transfer: Transfer, result: TransferResult) -> None:
        """Close a transfer and enter it in the audit log, in one transaction; a closed one stays as it is."""
        now_ms = self._now_ms()
        kept = WriteOffTransfer
        with self._database.write() as session:
            done = session.execute(
                update(kept)
                .where(
                    kept.period_ms == transfer.period_ms,
                    kept.user_id == transfer.user_id,
                    kept.node_id == transfer.node_id,
                    kept.closed_at_ms.is_(None),
                )
                .values(closed_at_ms=now_ms, outcome=result.outcome, moved_us=result.amount_us)
            )
            assert isinstance(done, CursorResult)
            if not done.rowcount:
                return
            audit.record(
                session,
                Actor(ActorType.SYSTEM, "write_off"),
                Action.WRITTEN_OFF,
                user_account(transfer.user_id),
                at_ms=now_ms,
                request_id=transfer.request_id,
                payload={
                    "node_account": node_account(transfer.node_id),
                    "amount_us": transfer.amount_us,
                    "outcome": result.outcome,
                    "moved_us": result.amount_us,
                    "balance_us": result.balance_us,
                },
            )
