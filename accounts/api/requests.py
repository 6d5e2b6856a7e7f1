"""How the state of a money request is answered."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials

from accounts import logins, money, nodes
from accounts.api import wire
from accounts.api.deps import InAccounts, InGateway, bearer, claims_of
from accounts.api.docs import problems
from accounts.api.problems import refusal
from accounts.api.wire import ID
from accounts.errors import Reason, Refused
from accounts.money import Answer, Status
from accounts.tokens import SubjectKind

router = APIRouter(prefix="/v1")

MONEY_PROBLEMS = (
    Reason.NOT_FOUND,
    Reason.REQUEST_CONFLICT,
    Reason.OVER_LIMIT,
    Reason.COMMANDS_AWAY,
)
MONEY_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {
        "model": wire.MoneyAnswer,
        "description": "Sent, and the result is not there yet: ask the URL in Location",
        "headers": {"Location": {"schema": {"type": "string"}}},
    }
}


def money_answer(answer: Answer) -> JSONResponse:
    """200 with the result, 202 with where to ask, or the problem that it met."""
    if answer.status is Status.INSUFFICIENT:
        refused = Refused(
            Reason.INSUFFICIENT_CREDIT, "the node's credit is less than that; nothing was moved"
        )
        return refusal(refused, request_id=answer.request_id)
    if answer.status is Status.OVER_LIMIT:
        refused = Refused(Reason.OVER_LIMIT, "a balance would leave its range; nothing was moved")
        return refusal(refused, request_id=answer.request_id)
    body = wire.MoneyAnswer.of(answer).model_dump(mode="json")
    if answer.status is Status.PENDING:
        return JSONResponse(body, 202, headers={"Location": f"/v1/requests/{answer.request_id}"})
    return JSONResponse(body, 200)


@router.get(
    "/requests/{request_id}",
    tags=["Money"],
    responses=problems(Reason.BAD_TOKEN, Reason.NOT_FOUND, Reason.BALANCES_AWAY, Reason.ARCHIVE_AWAY),
)
def get_request(
    request_id: Annotated[str, Path(pattern=ID)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    accounts: InAccounts,
    gateway: InGateway,
) -> wire.MoneyAnswer:
    """What is known of a money request: of one's own for users and nodes, of any for operators."""
    claims = claims_of(accounts, credentials)
    if claims.kind is SubjectKind.NODE:
        asker: str | None = str(nodes.itself(accounts, claims).actor)
    else:
        person = logins.person(accounts, claims)
        asker = None if person.role == "operator" else str(person.actor)
    return wire.MoneyAnswer.of(money.status(accounts, gateway, request_id, asker=asker))
