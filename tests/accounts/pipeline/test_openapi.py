"""The OpenAPI document is what the API does: schemathesis finds nothing that differs.

A bounded number of examples, the same ones each time. Whoever asks is an operator or, where it is for nodes,
a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from accounts.api.problems import MEDIA_TYPE
from tests.accounts.support import Client

EXAMPLES = 15
REFUSED_FOR_WHAT_THEY_SAY = ("weak-password", "bad-cursor", "over-limit")

MakeClient = Callable[..., Client]


@pytest.fixture
def asked(make_client: MakeClient) -> Client:
    """The API, whose limits are out of the way and which waits for no result."""
    return make_client(0.0, limited=False)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_is_documented_is_what_is_done(asked: Client, mode: GenerationMode) -> None:
    """Statuses, media types, schemas, headers; valid requests are taken, others refused, nobody comes in
    unasked.
    """
    app = asked.http.app
    assert isinstance(app, FastAPI)
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", app)
    tried: Counter[str] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            # Of the rest only query parameters could be wrong, and unknown ones are ignored, as is usual.
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Case) -> None:
            tried[case.operation.label] += 1
            response = case.call(headers=_authorised(asked, case.path))
            # These fit the schema, and are refused for what they say.
            meant = response.status_code == 422 and _kind(response.json()) in REFUSED_FOR_WHAT_THEY_SAY
            case.validate_response(response, excluded_checks=[positive_data_acceptance] if meant else [])

        check()
    assert len(tried) > (10 if mode is GenerationMode.NEGATIVE else 30)


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


def _kind(problem: dict[str, object]) -> str:
    return str(problem["type"]).rpartition(":")[2]


# Deliverable as far as a syntax can tell: reserved domains are refused.
schemathesis.openapi.format("email", st.from_regex(r"\A[a-z0-9]{1,20}@example\.com\Z"))

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
