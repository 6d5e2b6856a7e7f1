"""Endpoints for operators. Each of them leaves an entry in the audit log."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from accounts import audit, money, users
from accounts.api import wire
from accounts.api.deps import Cursor, IdempotencyKey, InAccounts, InGateway, Limit, Operator
from accounts.api.docs import problems
from accounts.api.people import statement_page
from accounts.api.requests import MONEY_PROBLEMS, MONEY_RESPONSES, money_answer
from accounts.api.wire import ID
from accounts.audit import Action
from accounts.context import Accounts
from accounts.errors import Reason
from accounts.logins import Person
from schemas.commands import CommandKind

router = APIRouter(prefix="/v1", tags=["Operators"])

_NEEDS_OPERATOR = (Reason.BAD_TOKEN, Reason.FORBIDDEN)

Kind = Annotated[Literal["user", "node"], Path(description="whose account")]
AccountId = Annotated[str, Path(pattern=ID, description="of the user or node", examples=["n-17"])]
Filter = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9._:/-]{1,256}$")]


@router.post(
    "/accounts/{kind}/{account_id}/top-ups",
    response_model=wire.MoneyAnswer,
    responses=problems(*_NEEDS_OPERATOR, *MONEY_PROBLEMS) | MONEY_RESPONSES,
)
async def top_up(
    kind: Kind,
    account_id: AccountId,
    body: wire.TopUp,
    key: IdempotencyKey,
    operator: Operator,
    accounts: InAccounts,
    gateway: InGateway,
) -> JSONResponse:
    """Give a user or a node minutes."""
    return await _move(CommandKind.TOP_UP, f"{kind}/{account_id}", body, key, operator, accounts, gateway)


@router.post(
    "/accounts/{kind}/{account_id}/adjustments",
    response_model=wire.MoneyAnswer,
    responses=problems(*_NEEDS_OPERATOR, *MONEY_PROBLEMS) | MONEY_RESPONSES,
)
async def adjust(
    kind: Kind,
    account_id: AccountId,
    body: wire.Adjustment,
    key: IdempotencyKey,
    operator: Operator,
    accounts: InAccounts,
    gateway: InGateway,
) -> JSONResponse:
    """Correct a balance, in either direction."""
    return await _move(CommandKind.ADJUSTMENT, f"{kind}/{account_id}", body, key, operator, accounts, gateway)


@router.get(
    "/accounts/{kind}/{account_id}/balance",
    responses=problems(*_NEEDS_OPERATOR, Reason.BALANCES_AWAY),
)
def get_account_balance(
    kind: Kind, account_id: AccountId, operator: Operator, accounts: InAccounts, gateway: InGateway
) -> wire.BalanceOut:
    """The live balance of a user or node; 0 for an account that nothing was ever posted to."""
    account = f"{kind}/{account_id}"
    _note_reading(accounts, operator, account)
    return wire.BalanceOut.of(gateway.balances.read([account])[account])


@router.get(
    "/accounts/{kind}/{account_id}/statement",
    responses=problems(*_NEEDS_OPERATOR, Reason.ARCHIVE_AWAY, Reason.BAD_CURSOR),
)
def get_account_statement(
    kind: Kind,
    account_id: AccountId,
    operator: Operator,
    accounts: InAccounts,
    gateway: InGateway,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> wire.Page[wire.StatementLine]:
    """Every change of an account's balance, the newest first."""
    account = f"{kind}/{account_id}"
    _note_reading(accounts, operator, account)
    return statement_page(gateway, account, limit, cursor)


@router.get("/users", responses=problems(*_NEEDS_OPERATOR, Reason.NOT_FOUND))
def find_user(
    operator: Operator,
    accounts: InAccounts,
    login: Annotated[str, Query(min_length=1, max_length=254, pattern=wire.PRINTABLE)],
) -> wire.ProfileOut:
    """The user with a username or e-mail address."""
    return wire.ProfileOut.of(users.find(accounts, login, operator.actor))


@router.get("/audit", responses=problems(*_NEEDS_OPERATOR, Reason.BAD_CURSOR))
def read_audit(
    operator: Operator,
    accounts: InAccounts,
    limit: Limit = 50,
    cursor: Cursor = None,
    action: Filter = None,
    actor_id: Filter = None,
    target: Filter = None,
) -> wire.Page[wire.AuditOut]:
    """The audit log, the newest first. Reading its first page is itself in it."""
    place = wire.place_of(cursor, int)
    with accounts.database.read() as session:
        entries = audit.page(
            session,
            before=None if place is None else place[0],
            limit=limit,
            action=action,
            actor_id=actor_id,
            target=target,
        )
        items = [wire.AuditOut.of(entry) for entry in entries]
    if place is None:
        with accounts.database.write() as session:
            audit.record(session, operator.actor, Action.AUDIT_READ, "audit_log", at_ms=accounts.now_ms())
    more = len(items) == limit
    return wire.Page(items=items, next_cursor=wire.cursor_of(items[-1].audit_id) if more else None)


async def _move(
    kind: CommandKind,
    account: str,
    body: wire.TopUp | wire.Adjustment,
    key: str,
    operator: Person,
    accounts: InAccounts,
    gateway: InGateway,
) -> JSONResponse:
    asked = money.asked_by_operator(operator, kind, account, wire.amount_us(body.minutes), key, body.reason)
    return money_answer(await money.carry_out(accounts, gateway, asked, operator.actor))


def _note_reading(accounts: Accounts, operator: Person, account: str) -> None:
    with accounts.database.write() as session:
        audit.record(session, operator.actor, Action.ACCOUNT_READ, account, at_ms=accounts.now_ms())
