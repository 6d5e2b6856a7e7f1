"""Who has which plan, and up to which period its minutes were given.

All block for as long as the database takes and raise SQLAlchemy's errors when it does not answer; all may be
repeated.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import delete, select, update
from sqlalchemy.engine import CursorResult

from accounts import audit
from accounts.audit import Action, Actor
from accounts.database import Database, insert_if_absent
from accounts.models import Subscription, User
from metering import plans
from metering.money import user_account


class Subscriptions:
    """Subscriptions in the accounts database; safe to share between threads."""

    def __init__(self, database: Database, now_ms: Callable[[], int]) -> None:
        self._database = database
        self._now_ms = now_ms

    def subscribe(self, user_id: str, plan: str, actor: Actor) -> bool:
        """Give a user a plan, from the period that lies now on; False when there is no such user. A user who
        has the plan keeps it."""
        with self._database.write() as session:
            if session.get(User, user_id) is None:
                return False
            now_ms = self._now_ms()
            values = {"user_id": user_id, "plan": plan, "issued_period_ms": 0, "subscribed_at_ms": now_ms}
            if insert_if_absent(session, Subscription, values):
                payload = {"plan": plan}
                target = user_account(user_id)
                audit.record(session, actor, Action.SUBSCRIBED, target, at_ms=now_ms, payload=payload)
            return True

    def unsubscribe(self, user_id: str, plan: str, actor: Actor) -> bool:
        """Take a plan away; whether the user had it. Minutes that were given stay until they expire."""
        with self._database.write() as session:
            done = session.execute(
                delete(Subscription).where(Subscription.user_id == user_id, Subscription.plan == plan)
            )
            assert isinstance(done, CursorResult)
            if done.rowcount:
                payload, target = {"plan": plan}, user_account(user_id)
                now_ms = self._now_ms()
                audit.record(session, actor, Action.UNSUBSCRIBED, target, at_ms=now_ms, payload=payload)
            return bool(done.rowcount)

    def not_issued(self, plan: str, period_ms: int, limit: int) -> list[plans.Subscription]:
        """Subscribers of a plan, `limit` at most, to whom the minutes of this period were not given."""
        query = (
            select(Subscription.user_id, Subscription.plan, Subscription.issued_period_ms)
            .where(Subscription.plan == plan, Subscription.issued_period_ms < period_ms)
            .order_by(Subscription.user_id)
            .limit(limit)
        )
        with self._database.read() as session:
            return [plans.Subscription(*row) for row in session.execute(query)]

    def note_issued(self, subscriptions: list[plans.Subscription], period_ms: int) -> None:
        """Their minutes of this period are given; it never goes back."""
        with self._database.write() as session:
            for subscription in subscriptions:
                session.execute(
                    update(Subscription)
                    .where(
                        Subscription.user_id == subscription.user_id,
                        Subscription.plan == subscription.plan,
                        Subscription.issued_period_ms < period_ms,
                    )
                    .values(issued_period_ms=period_ms)
                )
