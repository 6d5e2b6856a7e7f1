"""Who asks, and what every endpoint works with."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from accounts import logins, nodes
from accounts.api.wire import ID, KEY, NODE_ID
from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.gateway import Gateway
from accounts.logins import Person
from accounts.nodes import NodeItself
from accounts.tokens import Claims

bearer = HTTPBearer(
    auto_error=False, bearerFormat="JWT", scheme_name="bearer", description="an access token of /v1/login"
)
node_bearer = HTTPBearer(
    auto_error=False,
    bearerFormat="JWT",
    scheme_name="node_bearer",
    description="an access token of /v1/nodes/token",
)


def accounts_of(request: Request) -> Accounts:
    """The domain."""
    return cast(Accounts, request.app.state.accounts)


def gateway_of(request: Request) -> Gateway:
    """The pipeline."""
    return cast(Gateway, request.app.state.gateway)


def address_of(request: Request) -> str:
    """Where the request comes from; behind a proxy, what the server was told to believe of its headers."""
    return request.client.host if request.client else "unknown"


InAccounts = Annotated[Accounts, Depends(accounts_of)]
InGateway = Annotated[Gateway, Depends(gateway_of)]
Address = Annotated[str, Depends(address_of)]


def claims_of(accounts: Accounts, credentials: HTTPAuthorizationCredentials | None) -> Claims:
    if credentials is None:
        raise Refused(Reason.BAD_TOKEN, "an access token is needed: Authorization: Bearer ...")
    return accounts.tokens.verify(credentials.credentials, accounts.now_ms())


def _person(
    accounts: InAccounts, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Person:
    return logins.person(accounts, claims_of(accounts, credentials))


def _operator(person: Annotated[Person, Depends(_person)]) -> Person:
    if person.role != "operator":
        raise Refused(Reason.FORBIDDEN, "this is for operators")
    return person


def _node(
    accounts: InAccounts, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(node_bearer)]
) -> NodeItself:
    return nodes.itself(accounts, claims_of(accounts, credentials))


Me = Annotated[Person, Depends(_person)]
Operator = Annotated[Person, Depends(_operator)]
TheNode = Annotated[NodeItself, Depends(_node)]

Limit = Annotated[int, Query(ge=1, le=200, description="at most so many")]
Cursor = Annotated[
    str | None,
    Query(
        pattern=r"^[A-Za-z0-9_-]{1,300}$", description="`next_cursor` of the page before; none for the first"
    ),
]
UserId = Annotated[str, Path(pattern=ID, examples=["01k3x6v8"])]
NodeId = Annotated[str, Path(pattern=NODE_ID, examples=["n-17"])]
IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=KEY,
        description="made by the client, a UUID for example; one key is carried out once, and repeating it is safe",
        examples=["1f0c5a0e-3d5c-4f0e-9d0a-7f3f5a6f1a11"],
    ),
]
