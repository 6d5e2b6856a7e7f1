"""What operators may and others may not, and that it is in the audit log."""

from __future__ import annotations

import pytest

from tests.accounts.support import Client, problem_of


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/audit"),
        ("GET", "/v1/users?login=ada"),
        ("GET", "/v1/accounts/user/u/balance"),
        ("GET", "/v1/accounts/user/u/statement"),
        ("POST", "/v1/accounts/user/u/top-ups"),
        ("POST", "/v1/accounts/user/u/adjustments"),
    ],
)
def test_operators_only(client: Client, method: str, path: str) -> None:
    """A user is refused, whatever else is right with the request."""
    headers = client.register().auth | {"Idempotency-Key": "k"}
    body = {"minutes": "1", "reason": "x"} if method == "POST" else None
    assert problem_of(client.http.request(method, path, json=body, headers=headers)) == "forbidden"


def test_reading_others_leaves_a_trace(client: Client) -> None:
    """Looking somebody up, reading a balance (that is away, too), and reading the log itself."""
    member, operator = client.register(), client.operator()
    found = client.http.get("/v1/users", params={"login": member.username}, headers=operator.auth)
    assert found.json()["user_id"] == member.user_id
    assert problem_of(client.http.get("/v1/users?login=nobody", headers=operator.auth)) == "not-found"
    client.http.get(f"/v1/accounts/user/{member.user_id}/balance", headers=operator.auth)
    client.audit(operator)
    mine = [(entry["action"], entry["target"]) for entry in client.audit(operator, actor_id=operator.user_id)]
    assert mine == [
        ("audit.read", "audit_log"),
        ("account.read", f"user/{member.user_id}"),
        ("user.read", "user/"),
        ("user.read", f"user/{member.user_id}"),
    ]


def test_the_audit_log_is_paged(client: Client) -> None:
    """Pages follow each other without a gap or an overlap, whatever is written meanwhile."""
    operator = client.operator()
    for _ in range(5):
        client.register()
    seen: list[int] = []
    cursor = None
    while True:
        page = client.http.get(
            "/v1/audit", params={"limit": 2} | ({"cursor": cursor} if cursor else {}), headers=operator.auth
        ).json()
        seen += [entry["audit_id"] for entry in page["items"]]
        client.register()
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == len(set(seen)) == 6


def test_the_profile_changes(client: Client) -> None:
    """What is given; the rest stays."""
    member = client.register()
    done = client.http.patch("/v1/me", json={"display_name": "Ada L. 李"}, headers=member.auth).json()
    assert (done["display_name"], done["language"]) == ("Ada L. 李", "en")
    done = client.http.patch("/v1/me", json={"language": "zh-Hant"}, headers=member.auth).json()
    assert (done["display_name"], done["language"]) == ("Ada L. 李", "zh-Hant")
