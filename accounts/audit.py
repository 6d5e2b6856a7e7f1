"""The audit log: every privileged act, append-only; triggers in the database refuse the rest.

An act is recorded in the transaction that does it, so there is no act without its entry and no entry without
its act. A money command is carried out elsewhere: its entry says that it was asked for, and is written before
it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from accounts.database import insert_if_absent
from accounts.models import AuditEntry


class ActorType(StrEnum):
    """Who acts."""

    USER = "user"
    OPERATOR = "operator"
    NODE = "node"
    SYSTEM = "system"


@dataclass(frozen=True)
class Actor:
    """Somebody who acts, as the audit log and a money command name them."""

    type: ActorType
    id: str

    def __str__(self) -> str:
        return f"{self.type}/{self.id}"


class Action(StrEnum):
    """What is recorded."""

    USER_REGISTERED = "user.registered"
    OPERATOR_CREATED = "operator.created"
    PASSWORD_CHANGED = "password.changed"
    LOGINS_REVOKED = "logins.revoked"
    REFRESH_REUSED = "refresh_token.reused"
    CODE_REPLACED = "security_code.replaced"
    NODE_REGISTERED = "node.registered"
    NODE_SECRET_REPLACED = "node.secret_replaced"
    NODE_BOUND = "node.bound"
    NODE_UNBOUND = "node.unbound"
    NODES_REORDERED = "nodes.reordered"
    TOP_UP_REQUESTED = "top_up.requested"
    ADJUSTMENT_REQUESTED = "adjustment.requested"
    WRITTEN_OFF = "debt.written_off"
    SUBSCRIBED = "plan.subscribed"
    UNSUBSCRIBED = "plan.unsubscribed"
    ACCOUNT_READ = "account.read"
    USER_READ = "user.read"
    AUDIT_READ = "audit.read"
    KEY_ROTATED = "signing_key.rotated"


def record(
    session: Session,
    actor: Actor,
    action: str,
    target: str,
    *,
    at_ms: int,
    request_id: str | None = None,
    payload: Mapping[str, Any] | None = None,
) -> bool:
    """Append an entry in this transaction; whether it is new: one with this action and request id is there once."""
    values = {
        "actor_type": actor.type.value,
        "actor_id": actor.id,
        "action": str(action),
        "target": target,
        "request_id": request_id,
        "payload": json.dumps(payload or {}, sort_keys=True, separators=(",", ":")),
        "at_ms": at_ms,
    }
    if request_id is not None:
        return insert_if_absent(session, AuditEntry, values)
    session.execute(insert(AuditEntry).values(**values))
    return True


def page(
    session: Session,
    *,
    before: int | None,
    limit: int,
    action: str | None = None,
    actor_id: str | None = None,
    target: str | None = None,
) -> list[AuditEntry]:
    """At most `limit` entries, the newest first, of those older than the entry `before`."""
    query = select(AuditEntry).order_by(AuditEntry.audit_id.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditEntry.audit_id < before)
    for column, wanted in (
        (AuditEntry.action, action),
        (AuditEntry.actor_id, actor_id),
        (AuditEntry.target, target),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    return list(session.scalars(query))
