"""What tests of the accounts say and do again and again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.testclient import TestClient
from httpx import Response

from accounts import users
from accounts.audit import Actor, ActorType
from accounts.context import Accounts
from accounts.passwords import Argon2Parameters

SECRET = "a secret of tests, long enough for all"
CHEAP = Argon2Parameters(time_cost=1, memory_kib=8, parallelism=1)
PASSWORD = "correct horse battery"
NOON_MS = 1_767_268_800_000
ROOT = Actor(ActorType.SYSTEM, "tests")

_numbers = itertools.count(1)
Result = TypeVar("Result")


class Clock:
    """Milliseconds since the Unix epoch, as a test sets them."""

    def __init__(self) -> None:
        self.now = NOON_MS

    def __call__(self) -> int:
        return self.now

    def go_on(self, seconds: float) -> None:
        """Later."""
        self.now += round(seconds * 1000)


@dataclass
class Member:
    """A user who is logged in."""

    user_id: str
    username: str
    access: str
    refresh: str

    @property
    def auth(self) -> dict[str, str]:
        """The header."""
        return {"Authorization": f"Bearer {self.access}"}


@dataclass
class Machine:
    """A node with a token."""

    node_id: str
    secret: str
    access: str

    @property
    def auth(self) -> dict[str, str]:
        """The header."""
        return {"Authorization": f"Bearer {self.access}"}


class Client:
    """The API as clients use it."""

    def __init__(self, http: TestClient, accounts: Accounts) -> None:
        self.http = http
        self.accounts = accounts

    def register(self, username: str | None = None) -> Member:
        """Register a user and log in."""
        username = username or f"user{next(_numbers)}"
        body = {"username": username, "email": f"{username}@example.com", "password": PASSWORD}
        done = self.http.post("/v1/register", json=body)
        assert done.status_code == 202, done.text
        return self.log_in(username)

    def operator(self) -> Member:
        """An operator who is logged in."""
        username = f"operator{next(_numbers)}"
        users.create_operator(self.accounts, username, f"{username}@example.com", PASSWORD, actor=ROOT)
        return self.log_in(username)

    def log_in(self, username: str, password: str = PASSWORD) -> Member:
        """Log in."""
        done = self.http.post("/v1/login", json={"login": username, "password": password})
        assert done.status_code == 200, done.text
        tokens = done.json()
        headers = {"Authorization": f"Bearer {tokens['access_token']}"}
        user_id = self.http.get("/v1/me", headers=headers).json()["user_id"]
        return Member(user_id, username, tokens["access_token"], tokens["refresh_token"])

    def node(self, owner: Member, node_id: str | None = None) -> Machine:
        """Register a node and get its token."""
        body = {"name": "a node"} | ({"node_id": node_id} if node_id else {})
        made = self.http.post("/v1/nodes", json=body, headers=owner.auth)
        assert made.status_code == 201, made.text
        return self.node_token(made.json()["node_id"], made.json()["client_secret"])

    def node_token(self, node_id: str, secret: str) -> Machine:
        """A token for a node."""
        done = self.http.post("/v1/nodes/token", json={"client_id": node_id, "client_secret": secret})
        assert done.status_code == 200, done.text
        return Machine(node_id, secret, done.json()["access_token"])

    def code(self, member: Member) -> str:
        """The member's security code."""
        return str(self.http.get("/v1/me/security-code", headers=member.auth).json()["security_code"])

    def bind(self, node: Machine, member: Member) -> None:
        """Bind the node to the member."""
        done = self.http.post("/v1/node/users", json={"security_code": self.code(member)}, headers=node.auth)
        assert done.status_code == 201, done.text

    def audit(self, operator: Member, **filters: Any) -> list[dict[str, Any]]:
        """The newest entries of the audit log."""
        done = self.http.get("/v1/audit", params={"limit": 200, **filters}, headers=operator.auth)
        assert done.status_code == 200, done.text
        return list(done.json()["items"])


def problem_of(response: Response) -> str:
    """The kind of problem; fails when the answer is no problem."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    body = response.json()
    assert body["status"] == response.status_code
    assert body["title"] and body["detail"]
    kind = str(body["type"])
    assert kind.startswith("urn:lingua-metering:problem:")
    return kind.rpartition(":")[2]


def at_once(times: int, do: Callable[[int], Result]) -> list[Result]:
    """What these calls, begun at once on as many threads, gave."""
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(do, range(times)))
