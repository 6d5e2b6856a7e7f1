"""What the write-off flow needs of the accounts: who pays for whom, and a place to record that it did. No HTTP.

Both block for as long as the database takes and raise SQLAlchemy's errors when it does not answer; both may be
repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from accounts import audit
from accounts.audit import Actor, ActorType
from accounts.database import Database
from accounts.models import Binding

CHUNK = 1_000
"""Users in one query; SQLite takes 32 766 variables."""


class WriteOffAccounts:
    """The accounts database, as the write-off flow sees it; safe to share between threads."""

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

    def record(
        self,
        actor_type: str,
        actor_id: str,
        action: str,
        target: str,
        request_id: str,
        payload: Mapping[str, Any],
    ) -> bool:
        """Append an act to the audit log, once for each (action, request_id); whether it is new.

        `actor_type`: user, operator, node or system. The first payload stays; a repeat changes nothing.
        """
        with self._database.write() as session:
            return audit.record(
                session,
                Actor(ActorType(actor_type), actor_id),
                action,
                target,
                at_ms=self._now_ms(),
                request_id=request_id,
                payload=payload,
            )
