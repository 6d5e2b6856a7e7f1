"""The database: migrations both ways, an audit log that only grows, transactions, and the write-off's view of
it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import DatabaseError, IntegrityError

from accounts import nodes, users
from accounts.audit import Actor, ActorType, record
from accounts.context import Accounts
from accounts.database import Database
from accounts.errors import DatabaseUnfit
from accounts.logins import Person
from accounts.migrate import current_revision, head_revision, migrate, migrate_down, require_current
from accounts.models import AuditEntry, Base, Binding
from accounts.nodes import NodeItself
from accounts.secrets import Secrets, check_secret
from accounts.write_off import WriteOffAccounts
from tests.accounts.support import PASSWORD, ROOT, SECRET, Clock, at_once


@pytest.fixture
def empty(dialect: str, make_url_of: Callable[[str, str], str]):  # type: ignore[no-untyped-def]
    """A database without a table."""
    opened = Database(make_url_of(dialect, "empty"))
    yield opened
    opened.close()


def test_up_down_and_up_again(empty: Database) -> None:
    """Each step there and back; at the bottom nothing of ours is left."""
    with pytest.raises(DatabaseUnfit, match=r"at revision none.*metering accounts migrate"):
        require_current(empty)
    assert migrate(empty) == (None, head_revision())
    assert migrate(empty) == (head_revision(), head_revision())
    require_current(empty)
    assert migrate_down(empty, "0001") == (head_revision(), "0001")
    assert migrate_down(empty) == ("0001", None)
    assert set(inspect(empty.engine).get_table_names()) <= {"alembic_version"}
    if not empty.is_sqlite:
        with empty.read() as session:
            left = session.scalars(text("SELECT proname FROM pg_proc WHERE proname LIKE 'audit%'")).all()
        assert not left
    assert migrate(empty) == (None, head_revision())
    _a_user_fits(empty)


def test_models_and_migrations_agree(database: Database) -> None:
    """Nothing that Alembic would still change."""
    with database.engine.connect() as connection:
        # SQLite has no identity columns to compare: it numbers rows by itself.
        opts = {"compare_type": True, "compare_server_default": not database.is_sqlite}
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_at_once(empty: Database) -> None:
    """One does it, the other finds it done."""
    found = at_once(3, lambda _: migrate(empty))
    assert sorted(before or "" for before, _ in found) == ["", head_revision(), head_revision()]
    assert current_revision(empty) == head_revision()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_log SET payload = 'changed'",
        "UPDATE audit_log SET at_ms = at_ms",
        "DELETE FROM audit_log",
        "DELETE FROM audit_log WHERE audit_id = 1",
    ],
)
def test_the_audit_log_only_grows(accounts: Accounts, statement: str) -> None:
    """The database refuses, and what was written stays."""
    _recorded(accounts)
    with pytest.raises(DatabaseError, match="append-only"), accounts.database.write() as session:
        session.execute(text(statement))
    assert _payloads(accounts) == ["{}"]


def test_the_audit_log_cannot_be_emptied_by_other_means(accounts: Accounts) -> None:
    """TRUNCATE on PostgreSQL, INSERT OR REPLACE on SQLite, also on a connection of somebody else's."""
    _recorded(accounts)
    if accounts.database.is_sqlite:
        import sqlite3

        other = sqlite3.connect(accounts.database.path)
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            other.execute(
                "INSERT OR REPLACE INTO audit_log (audit_id, actor_type, actor_id, action, target, payload, at_ms)"
                " VALUES (1, 'system', 'x', 'x', 'x', 'changed', 0)"
            )
        other.close()
    else:
        with pytest.raises(DatabaseError, match="append-only"), accounts.database.write() as session:
            session.execute(text("TRUNCATE audit_log"))
    assert _payloads(accounts) == ["{}"]


def test_an_act_that_fails_leaves_no_entry(accounts: Accounts) -> None:
    """They share one transaction."""
    with pytest.raises(RuntimeError), accounts.database.write() as session:
        record(session, ROOT, "x", "x", at_ms=0)
        raise RuntimeError
    assert _payloads(accounts) == []


def test_writers_take_turns(accounts: Accounts) -> None:
    """Many that read and then write: none is turned away, none works on what another one changed."""

    def add(_number: int) -> None:
        with accounts.database.write() as session:
            session.execute(
                text("SELECT 1 FROM meta WHERE name = 'n' FOR UPDATE")
                if not accounts.database.is_sqlite
                else text("SELECT 1")
            )
            count = session.execute(text("SELECT value FROM meta WHERE name = 'n'")).scalar_one()
            session.execute(
                text("UPDATE meta SET value = :value WHERE name = 'n'"), {"value": str(int(count) + 1)}
            )

    with accounts.database.write() as session:
        session.execute(text("INSERT INTO meta (name, value) VALUES ('n', '0')"))
    at_once(16, add)
    with accounts.database.read() as session:
        assert session.execute(text("SELECT value FROM meta WHERE name = 'n'")).scalar_one() == "16"


def test_foreign_keys_hold(accounts: Accounts) -> None:
    """On SQLite too, where they are off by default."""
    with pytest.raises(IntegrityError), accounts.database.write() as session:
        session.add(Binding(node_id="n", user_id="u", position=1, bound_at_ms=0))


def test_another_secret_is_refused(accounts: Accounts) -> None:
    """At the start, in one line that gives neither secret away."""
    with pytest.raises(DatabaseUnfit, match="METERING_ACCOUNTS_SECRET") as caught:
        check_secret(accounts.database, Secrets(SECRET + "!"))
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    check_secret(accounts.database, Secrets(SECRET))


def test_the_write_off_sees_who_pays_first(accounts: Accounts, clock: Clock) -> None:
    """Bound nodes in the order of priority, for those users who have any."""
    people = [
        users.create_operator(accounts, f"user-{number}", f"u{number}@example.com", PASSWORD, actor=ROOT)[0]
        for number in range(3)
    ]
    for node_id in ("n-1", "n-2", "n-3"):
        nodes.register(accounts, Person(people[0], "operator", ""), "x", node_id)
    for user_id, node_ids in ((people[0], ("n-2", "n-3", "n-1")), (people[1], ("n-1",))):
        for node_id in node_ids:
            code = users.security_code(accounts, user_id)
            nodes.bind(accounts, NodeItself(node_id, people[0]), code, "192.0.2.1")
    view = WriteOffAccounts(accounts.database, clock)
    expected = {people[0]: ["n-2", "n-3", "n-1"], people[1]: ["n-1"]}
    assert view.bound_nodes([*people, "nobody"]) == expected
    nodes.reorder(accounts, Person(people[0], "operator", ""), ["n-1", "n-2", "n-3"])
    many = [f"u-{number}" for number in range(3_000)]
    assert view.bound_nodes([*many, people[0]]) == {people[0]: ["n-1", "n-2", "n-3"]}
    assert view.bound_nodes([]) == {}


def _recorded(accounts: Accounts) -> None:
    with accounts.database.write() as session:
        assert record(session, Actor(ActorType.USER, "u"), "x", "user/u", at_ms=1)


def _payloads(accounts: Accounts) -> list[str]:
    with accounts.database.read() as session:
        return [entry.payload for entry in session.query(AuditEntry).order_by(AuditEntry.audit_id)]


def _a_user_fits(database: Database) -> None:
    from accounts.context import AccountsConfig
    from tests.accounts.support import CHEAP

    accounts = Accounts(database, Secrets(SECRET), AccountsConfig(argon2=CHEAP), Clock())
    users.register(accounts, "ada", "ada@example.com", PASSWORD, "192.0.2.1")
    assert _payloads(accounts) == ["{}"]
