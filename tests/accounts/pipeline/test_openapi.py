"""The OpenAPI document is what the API does: schemathesis finds nothing that differs.

A bounded number of examples, the same ones each time. Whoever asks is an operator or, where it is for nodes, a node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis import Case

from accounts.api.problems import MEDIA_TYPE
from tests.accounts.support import Client

EXAMPLES = 15

MakeClient = Callable[..., Client]


@pytest.fixture
def asked(make_client: MakeClient) -> Client:
    """The API, whose limits are out of the way and which waits for no result."""
    return make_client(0.0, limited=False)


@pytest.fixture
def openapi(asked: Client) -> Any:
    """It, as schemathesis takes it."""
    app = asked.http.app
    assert isinstance(app, FastAPI)
    return schemathesis.openapi.from_asgi("/v1/openapi.json", app)


schema = schemathesis.pytest.from_fixture("openapi")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_what_is_documented_is_what_is_done(case: Case, asked: Client) -> None:
    """Statuses, media types, schemas, headers; valid requests are taken, others refused, nobody comes in unasked."""
    case.call_and_validate(headers=_authorised(asked, case.path))


def test_every_operation_is_documented(asked: Client) -> None:
    """A summary, a description of each answer, and every error as a problem."""
    document = asked.http.get("/v1/openapi.json").json()
    operations = [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) > 30
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for name, operation in operations:
        assert operation["summary"] and operation["description"], name
        for status, response in operation["responses"].items():
            assert response["description"], (name, status)
            if int(status) >= 400:
                assert list(response["content"]) == [MEDIA_TYPE], (name, status)


_tokens: dict[tuple[int, str], dict[str, str]] = {}


def _authorised(client: Client, path: str) -> dict[str, str]:
    """The header of somebody whom the path is for, who may have been logged out by the example before."""
    kind = "node" if path == "/v1/node" or path.startswith("/v1/node/") else "operator"
    known = _tokens.get((id(client), kind))
    probe = "/v1/node" if kind == "node" else "/v1/me"
    if known is None or client.http.get(probe, headers=known).status_code != 200:
        operator = client.operator()
        known = operator.auth if kind == "operator" else client.node(operator).auth
        _tokens[id(client), kind] = known
    return known
