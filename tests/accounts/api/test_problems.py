"""Every error is a problem, says where, and repeats nothing secret."""

from __future__ import annotations

import logging

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from accounts.api.app import create_app
from accounts.api.wire import cursor_of
from accounts.context import Accounts
from accounts.gateway import Gateway
from tests.accounts.support import PASSWORD, Client, problem_of


def test_what_does_not_fit_is_said_with_its_place(client: Client) -> None:
    """Each fault by its field; the password is not in the answer."""
    body = {"username": "a", "email": "no address", "password": "hush-hush", "colour": "red"}
    refused = client.http.post("/v1/register", json=body)
    assert problem_of(refused) == "invalid-request"
    assert sorted(error["where"] for error in refused.json()["errors"]) == [
        "body.colour",
        "body.email",
        "body.password",
        "body.username",
    ]
    assert "hush-hush" not in refused.text


@pytest.mark.parametrize(
    "content", [b"", b"{", b'"text"', b"[]", b'{"login": "\\ud800", "password": "x"}', b"\xff", b"[" * 5000]
)
def test_a_broken_body_is_a_problem(client: Client, content: bytes) -> None:
    """Whatever is sent in place of JSON."""
    headers = {"Content-Type": "application/json"}
    assert problem_of(client.http.post("/v1/login", content=content, headers=headers)) == "invalid-request"


def test_a_large_body_is_refused_unread(client: Client) -> None:
    """Whether its length is said or not."""
    large = b'{"login": "' + b"a" * 70_000 + b'"}'
    assert problem_of(client.http.post("/v1/login", content=large)) == "content-too-large"
    chunks = (large[start : start + 1000] for start in range(0, len(large), 1000))
    assert problem_of(client.http.post("/v1/login", content=chunks)) == "content-too-large"


def test_unknown_paths_and_methods(client: Client) -> None:
    """Problems too."""
    assert problem_of(client.http.get("/v1/nothing")) == "not-found"
    refused = client.http.put("/v1/login")
    assert problem_of(refused) == "method-not-allowed"
    assert refused.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "cursor", ["x", cursor_of("a"), cursor_of(1, "a"), cursor_of(2**80), cursor_of(True)]
)
def test_a_cursor_of_another_list_is_refused(client: Client, cursor: str) -> None:
    """It is said, and not taken for the first page."""
    done = client.http.get("/v1/audit", params={"cursor": cursor}, headers=client.operator().auth)
    assert problem_of(done) == "bad-cursor"


def test_servers_that_are_away(client: Client) -> None:
    """Balance and statement say which one, and when to come again; logging in goes on."""
    member = client.register()
    for path, kind in (
        ("balance", "balances-away"),
        ("statement", "archive-away"),
        ("usage?by=room", "archive-away"),
    ):
        done = client.http.get(f"/v1/me/{path}", headers=member.auth)
        assert (done.status_code, problem_of(done)) == (503, kind)
        assert int(done.headers["retry-after"]) > 0


def test_a_database_that_breaks_is_a_problem(accounts: Accounts, no_gateway: Gateway) -> None:
    """A fault is told in the log, not to the client."""
    with accounts.database.write() as session:
        session.execute(text("ALTER TABLE attempts RENAME TO lost"))
    with TestClient(create_app(accounts, no_gateway), raise_server_exceptions=False) as http:
        logging.getLogger("lingua.accounts").disabled = True
        try:
            done = http.post("/v1/login", json={"login": "ada", "password": PASSWORD})
        finally:
            logging.getLogger("lingua.accounts").disabled = False
    assert problem_of(done) in ("internal", "database-away")
    assert "attempts" not in done.text


def test_health(client: Client, accounts: Accounts) -> None:
    """Alive and ready without the pipeline, which is said; not ready without the tables."""
    assert client.http.get("/healthz").json() == {"status": "ok"}
    assert client.http.get("/readyz").json() == {"database": "ok", "balances": "away", "archive": "away"}
    with accounts.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    unready = client.http.get("/readyz")
    assert problem_of(unready) == "database-unfit"
    assert "metering accounts migrate" in unready.json()["detail"]


def test_metrics(client: Client) -> None:
    """Answers are counted by route, not by what varies in it."""
    client.http.get("/v1/requests/some-id")
    page = client.http.get("/metrics").text
    assert 'metering_accounts_http_total{route="GET /v1/requests/{request_id}",status="401"}' in page
