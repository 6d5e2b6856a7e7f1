"""Backup and restore, from either database into either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from accounts.api.app import create_app
from accounts.backup import BackupError, back_up, restore
from accounts.context import Accounts
from accounts.database import Database
from accounts.errors import DatabaseUnfit
from accounts.gateway import Gateway
from accounts.migrate import migrate, migrate_down
from accounts.secrets import Secrets
from tests.accounts.support import SECRET, Client, problem_of

MakeUrl = Callable[[str, str], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, make_url_of: MakeUrl) -> Iterator[Database]:
    """An empty database to restore into."""
    opened = Database(make_url_of(request.param, "empty"))
    yield opened
    opened.close()


def rows(file: Path) -> list[bytes]:
    """The rows of a backup, without what is about the file."""
    return file.read_bytes().splitlines()[1:-1]


def filled(client: Client) -> dict[str, Any]:
    """Users, nodes, bindings in an order, log-ins used and revoked, attempts, two keys."""
    member, other = client.register("ada"), client.register("bob")
    machines = [client.node(other), client.node(other)]
    for machine in machines:
        client.bind(machine, member)
    order = {"node_ids": [machine.node_id for machine in reversed(machines)]}
    assert client.http.put("/v1/me/nodes", json=order, headers=member.auth).status_code == 200
    client.http.patch("/v1/me", json={"display_name": 'Ada "L." 李 \\ 😀'}, headers=member.auth)
    client.http.post("/v1/refresh", json={"refresh_token": other.refresh})
    client.http.post("/v1/login", json={"login": "ada", "password": "wrong"})
    from tests.accounts.support import ROOT

    client.accounts.tokens.rotate(ROOT, client.accounts.now_ms())
    return {"member": member, "other": other, "machine": machines[0], "operator": client.operator()}


def answers(client: Client, who: dict[str, Any]) -> list[object]:
    """Answers to the questions that users, nodes and operators ask."""
    said: list[object] = []
    for headers, path in (
        (who["member"].auth, "/v1/me"),
        (who["member"].auth, "/v1/me/security-code"),
        (who["member"].auth, "/v1/me/nodes"),
        (who["member"].auth, "/v1/me/logins"),
        (who["other"].auth, "/v1/nodes"),
        (who["machine"].auth, "/v1/node"),
        (who["operator"].auth, "/v1/audit?cursor=WzEwMDAwMF0"),
        ({}, "/.well-known/jwks.json"),
    ):
        done = client.http.get(path, headers=headers)
        assert done.status_code == 200, done.text
        said.append(done.json())
    return said


def test_the_same_answers_afterwards(
    client: Client, target: Database, no_gateway: Gateway, tmp_path: Path
) -> None:
    """Also to tokens that were issued before, and counting goes on where it was; a second backup has the same
    rows.
    """
    who = filled(client)
    before = answers(client, who)
    file, again = tmp_path / "one.backup", tmp_path / "two.backup"
    counts = back_up(client.accounts.database, file, client.accounts.secrets, "now")
    assert counts["users"] == 3 and counts["bindings"] == 2 and counts["attempts"] > 0
    assert file.stat().st_mode & 0o077 == 0

    assert restore(target, file, Secrets(SECRET)) == counts
    accounts = Accounts(target, Secrets(SECRET), client.accounts.config, client.accounts.now_ms)
    back_up(target, again, accounts.secrets, "later")
    assert rows(again) == rows(file)
    with TestClient(create_app(accounts, no_gateway)) as http:
        restored = Client(http, accounts)
        assert answers(restored, who) == before
        # The refresh token that was used stays used.
        reused = http.post("/v1/refresh", json={"refresh_token": who["other"].refresh})
        assert problem_of(reused) == "refresh-reused"
        last = before[6]["items"][0]["audit_id"]  # type: ignore[index]
        restored.register("eve")
        newest = restored.audit(who["operator"])
        assert [entry["action"] for entry in newest[:2]] == ["user.registered", "refresh_token.reused"]
        assert newest[1]["audit_id"] == last + 1
        with pytest.raises(Exception, match="append-only"), target.write() as session:
            session.execute(text("DELETE FROM audit_log"))


def test_a_database_that_is_not_empty_is_left_alone(client: Client, target: Database, tmp_path: Path) -> None:
    """One that was only migrated counts as empty."""
    file = tmp_path / "a.backup"
    client.register()
    counts = back_up(client.accounts.database, file, client.accounts.secrets, "now")
    with pytest.raises(DatabaseUnfit, match="not empty"):
        restore(client.accounts.database, file, client.accounts.secrets)
    migrate(target)
    assert restore(target, file, client.accounts.secrets) == counts
    with pytest.raises(DatabaseUnfit, match="not empty"):
        restore(target, file, client.accounts.secrets)


def test_another_secret_is_refused_before_anything_is_written(
    client: Client, target: Database, tmp_path: Path
) -> None:
    """The target stays empty, and the right secret restores."""
    file = tmp_path / "a.backup"
    back_up(client.accounts.database, file, client.accounts.secrets, "now")
    with pytest.raises(DatabaseUnfit, match="METERING_ACCOUNTS_SECRET"):
        restore(target, file, Secrets(SECRET + "!"))
    assert restore(target, file, Secrets(SECRET))


@pytest.mark.parametrize("damage", ["cut", "changed", "line lost", "no backup", "no json"])
def test_a_damaged_file_is_refused_before_anything_is_written(
    client: Client, target: Database, tmp_path: Path, damage: str
) -> None:
    """Cut short, changed in one character, with a line less, or something else altogether."""
    file = tmp_path / "a.backup"
    client.register("ada")
    back_up(client.accounts.database, file, client.accounts.secrets, "now")
    lines = file.read_bytes().splitlines(keepends=True)
    if damage == "cut":
        lines = lines[:-1]
    elif damage == "changed":
        lines = [line.replace(b'"ada"', b'"eva"') for line in lines]
    elif damage == "line lost":
        lines = lines[:3] + lines[4:]
    elif damage == "no backup":
        lines = [json.dumps({"format": "other"}).encode()]
    else:
        lines = [b"\xff\n"]
    file.write_bytes(b"".join(lines))
    with pytest.raises(BackupError, match=r"a\.backup"):
        restore(target, file, client.accounts.secrets)
    with pytest.raises(DatabaseUnfit, match="empty: there is nothing"):
        back_up(target, tmp_path / "b.backup", client.accounts.secrets, "now")


def test_an_older_backup_is_brought_up_to_date(client: Client, target: Database, tmp_path: Path) -> None:
    """It is restored into the schema that it was made from, and migrated."""
    client.register()
    migrate_down(client.accounts.database, "0001")
    file = tmp_path / "old.backup"
    counts = back_up(client.accounts.database, file, client.accounts.secrets, "then")
    assert restore(target, file, client.accounts.secrets) == counts
    with pytest.raises(Exception, match="append-only"), target.write() as session:
        session.execute(text("DELETE FROM audit_log"))


def test_a_backup_never_replaces_a_file(client: Client, tmp_path: Path) -> None:
    """The one that is there may be the only one."""
    file = tmp_path / "a.backup"
    file.write_text("precious")
    with pytest.raises(BackupError, match="exists"):
        back_up(client.accounts.database, file, client.accounts.secrets, "now")
    assert file.read_text() == "precious"
    assert list(tmp_path.glob("a.backup*")) == [file]


def test_a_backup_is_one_state_while_others_write(client: Client, tmp_path: Path) -> None:
    """What is committed after its beginning is not in it, in any table."""
    client.register()
    with client.accounts.database.snapshot() as connection:
        assert connection.execute(text("SELECT count(*) FROM users")).scalar_one() == 1
        client.register()
        assert connection.execute(text("SELECT count(*) FROM users")).scalar_one() == 1
        assert connection.execute(text("SELECT count(*) FROM audit_log")).scalar_one() == 1
