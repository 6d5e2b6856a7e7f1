"""The write-off book on both databases: plans written once, transfers closed once, each with its audit entry."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import event, select

from accounts.audit import Actor, ActorType
from accounts.context import Accounts
from accounts.models import AuditEntry
from accounts.plans import Subscriptions
from accounts.users import create_operator
from accounts.write_off import WriteOffAccounts
from metering.write_off import Transfer, TransferResult
from tests.accounts.support import PASSWORD, Clock, at_once

SYSTEM = Actor(ActorType.SYSTEM, "test")
PERIOD_MS = 1_767_225_600_000
FIRST = Transfer(PERIOD_MS, "u-1", "n-1", 70)
SECOND = Transfer(PERIOD_MS, "u-1", "n-2", 30)
LATER = Transfer(PERIOD_MS + 1, "u-1", "n-1", 5)


@pytest.fixture
def book(accounts: Accounts, clock: Clock) -> WriteOffAccounts:
    """An empty book."""
    return WriteOffAccounts(accounts.database, clock)


def entries(accounts: Accounts) -> list[AuditEntry]:
    with accounts.database.read() as session:
        return list(session.scalars(select(AuditEntry).order_by(AuditEntry.audit_id)))


def test_a_period_is_planned_once(book: WriteOffAccounts) -> None:
    """The first plan counts, also of several at once; and an empty one is a plan."""
    at_once(4, lambda number: book.plan(PERIOD_MS, [FIRST._replace(amount_us=number + 1)]))
    assert len(book.open_transfers()) == 1
    book.plan(PERIOD_MS + 9, [])
    assert book.is_planned(PERIOD_MS) and book.is_planned(PERIOD_MS + 9)
    assert not book.is_planned(PERIOD_MS + 1)


def test_open_transfers_come_in_the_order_of_their_plans(book: WriteOffAccounts) -> None:
    """Older periods first; within one the order in which they are to be carried out."""
    book.plan(LATER.period_ms, [LATER])
    book.plan(PERIOD_MS, [SECOND, FIRST])
    assert book.open_transfers() == [SECOND, FIRST, LATER]


def test_a_transfer_is_closed_once_together_with_its_audit_entry(
    book: WriteOffAccounts, accounts: Accounts
) -> None:
    """However often and by however many at once; the first result stays."""
    book.plan(PERIOD_MS, [FIRST, SECOND])
    at_once(4, lambda number: book.close(FIRST, TransferResult("APPLIED", 60 + number, -10)))
    book.close(FIRST, TransferResult("APPLIED", 1, 1))
    assert book.open_transfers() == [SECOND]
    (entry,) = entries(accounts)
    told = (entry.actor_type, entry.actor_id, entry.action, entry.target, entry.request_id)
    assert told == ("system", "write_off", "debt.written_off", "user/u-1", FIRST.request_id)
    payload = json.loads(entry.payload)
    assert payload["moved_us"] in range(60, 64)
    assert (payload["node_account"], payload["amount_us"], payload["balance_us"]) == ("node/n-1", 70, -10)


def test_what_fails_between_the_two_halves_leaves_neither(book: WriteOffAccounts, accounts: Accounts) -> None:
    """A transfer is open for as long as its audit entry is not there."""
    book.plan(PERIOD_MS, [FIRST])
    engine = accounts.database.engine

    def fail(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "INTO audit_log" in statement:
            raise RuntimeError("killed here")

    event.listen(engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError):
        book.close(FIRST, TransferResult("APPLIED", 70, 0))
    event.remove(engine, "before_cursor_execute", fail)
    assert book.open_transfers() == [FIRST]
    assert entries(accounts) == []
    book.close(FIRST, TransferResult("APPLIED", 70, 0))
    assert (book.open_transfers(), len(entries(accounts))) == ([], 1)


def test_subscribers_are_given_each_period_once(accounts: Accounts, clock: Clock) -> None:
    """A period that is noted is over; who has no such user, or no plan any more, gets nothing."""
    subscriptions = Subscriptions(accounts.database, clock)
    people = [
        create_operator(accounts, f"user-{number}", f"u{number}@example.com", PASSWORD, actor=SYSTEM)[0]
        for number in range(3)
    ]
    assert not subscriptions.subscribe("nobody", "basic", SYSTEM)
    for user_id in (*people, people[0]):
        assert subscriptions.subscribe(user_id, "basic", SYSTEM)
    found = subscriptions.not_issued("basic", PERIOD_MS, 10)
    assert sorted(each.user_id for each in found) == sorted(people)
    subscriptions.note_issued(found[:2], PERIOD_MS)
    subscriptions.note_issued(found[:1], PERIOD_MS - 5)
    assert subscriptions.not_issued("basic", PERIOD_MS, 10) == found[2:]
    assert len(subscriptions.not_issued("basic", PERIOD_MS + 1, 2)) == 2
    assert subscriptions.unsubscribe(found[2].user_id, "basic", SYSTEM)
    assert not subscriptions.unsubscribe(found[2].user_id, "basic", SYSTEM)
    assert subscriptions.not_issued("basic", PERIOD_MS, 10) == []
    acts = [entry.action for entry in entries(accounts) if entry.action.startswith("plan.")]
    assert acts == ["plan.subscribed"] * 3 + ["plan.unsubscribed"]
