"""Endpoints for people: registering, logging in, and what is theirs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from accounts import logins, nodes, users
from accounts.api import wire
from accounts.api.deps import Address, Cursor, InAccounts, InGateway, Limit, Me, NodeId
from accounts.api.docs import problems
from accounts.errors import Reason
from accounts.gateway import Gateway, UsageTotal
from metering.money import user_account
from schemas.rfc3339 import format_rfc3339_ms

router = APIRouter(prefix="/v1")

_NEEDS_TOKEN = (Reason.BAD_TOKEN, Reason.FORBIDDEN)


@router.post(
    "/register",
    status_code=202,
    tags=["Logging in"],
    responses=problems(Reason.USERNAME_TAKEN, Reason.WEAK_PASSWORD, Reason.TOO_MANY_ATTEMPTS),
)
def register(body: wire.Register, accounts: InAccounts, address: Address) -> wire.Accepted:
    """Register a user; log in next.

    The answer is the same when the e-mail address is taken; then no user is made.
    """
    users.register(accounts, body.username, body.email, body.password, address)
    return wire.Accepted()


@router.post(
    "/login",
    tags=["Logging in"],
    responses=problems(Reason.BAD_CREDENTIALS, Reason.TOO_MANY_ATTEMPTS),
)
def log_in(body: wire.LogIn, accounts: InAccounts, address: Address, response: Response) -> wire.TokenPair:
    """Log in with username or e-mail address, and password."""
    response.headers["Cache-Control"] = "no-store"
    return wire.TokenPair.of(logins.log_in(accounts, body.login, body.password, address))


@router.post(
    "/refresh",
    tags=["Logging in"],
    responses=problems(Reason.BAD_TOKEN, Reason.REFRESH_REUSED, Reason.TOO_MANY_ATTEMPTS),
)
def refresh(
    body: wire.RefreshToken, accounts: InAccounts, address: Address, response: Response
) -> wire.TokenPair:
    """Exchange a refresh token for new tokens.

    It works once. A second use means that two have it: the whole log-in is revoked.
    """
    response.headers["Cache-Control"] = "no-store"
    return wire.TokenPair.of(logins.refresh(accounts, body.refresh_token, address))


@router.post("/logout", status_code=204, tags=["Logging in"])
def log_out(body: wire.RefreshToken, accounts: InAccounts) -> None:
    """End the log-in of a refresh token. An unknown token gets the same answer."""
    logins.log_out(accounts, body.refresh_token)


@router.get("/me", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def get_profile(me: Me, accounts: InAccounts) -> wire.ProfileOut:
    """My profile."""
    return wire.ProfileOut.of(users.profile(accounts, me.user_id))


@router.patch("/me", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def change_profile(body: wire.ChangeProfile, me: Me, accounts: InAccounts) -> wire.ProfileOut:
    """Change my profile; what is absent or null stays."""
    changed = users.change_profile(
        accounts, me.user_id, display_name=body.display_name, language=body.language
    )
    return wire.ProfileOut.of(changed)


@router.post(
    "/me/password",
    status_code=204,
    tags=["Me"],
    responses=problems(*_NEEDS_TOKEN, Reason.BAD_CREDENTIALS, Reason.WEAK_PASSWORD, Reason.TOO_MANY_ATTEMPTS),
)
def change_password(body: wire.ChangePassword, me: Me, accounts: InAccounts, address: Address) -> None:
    """Change my password. Every log-in is revoked, this one too."""
    users.change_password(accounts, me.user_id, body.current_password, body.new_password, address)


@router.get("/me/logins", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def list_logins(me: Me, accounts: InAccounts) -> wire.Logins:
    """My living log-ins, the newest first."""
    return wire.Logins(
        items=[
            wire.LoginOut(
                login_id=login.login_id,
                current=login.login_id == me.login_id,
                created_at=format_rfc3339_ms(login.created_at_ms),
                refreshed_at=format_rfc3339_ms(login.refreshed_at_ms),
                expires_at=format_rfc3339_ms(login.expires_at_ms),
            )
            for login in logins.living(accounts, me.user_id)
        ]
    )


@router.delete("/me/logins", status_code=204, tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def log_out_everywhere(me: Me, accounts: InAccounts) -> None:
    """Revoke all my log-ins, this one too."""
    logins.log_out_everywhere(accounts, me.user_id)


@router.get("/me/security-code", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def get_security_code(me: Me, accounts: InAccounts, response: Response) -> wire.SecurityCode:
    """My security code, for a node that shall be bound to me."""
    response.headers["Cache-Control"] = "no-store"
    return wire.SecurityCode(security_code=users.security_code(accounts, me.user_id))


@router.post("/me/security-code", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def replace_security_code(me: Me, accounts: InAccounts, response: Response) -> wire.SecurityCode:
    """Replace my security code. Nodes that are bound stay so."""
    response.headers["Cache-Control"] = "no-store"
    return wire.SecurityCode(security_code=users.replace_security_code(accounts, me.user_id))


@router.get("/me/balance", tags=["Me"], responses=problems(*_NEEDS_TOKEN, Reason.BALANCES_AWAY))
def get_balance(me: Me, gateway: InGateway) -> wire.BalanceOut:
    """My live balance."""
    account = user_account(me.user_id)
    return wire.BalanceOut.of(gateway.balances.read([account])[account])


@router.get(
    "/me/statement",
    tags=["Me"],
    responses=problems(*_NEEDS_TOKEN, Reason.ARCHIVE_AWAY, Reason.BAD_CURSOR),
)
def get_statement(
    me: Me, gateway: InGateway, limit: Limit = 50, cursor: Cursor = None
) -> wire.Page[wire.StatementLine]:
    """Every change of my balance, the newest first; a moment behind the live balance."""
    return statement_page(gateway, user_account(me.user_id), limit, cursor)


@router.get(
    "/me/usage",
    tags=["Me"],
    responses=problems(*_NEEDS_TOKEN, Reason.ARCHIVE_AWAY, Reason.BAD_CURSOR),
)
def get_usage(
    me: Me,
    gateway: InGateway,
    by: Annotated[wire.UsageBy, Query(description="sessions without a room, or rooms")],
    limit: Limit = 50,
    cursor: Cursor = None,
) -> wire.Page[wire.UsageOut]:
    """What I was charged per session or per room, the latest first."""
    read = gateway.archive.usage_by_session if by == "session" else gateway.archive.usage_by_room
    found: list[UsageTotal] = read(me.user_id, wire.place_of(cursor, int, str), limit)
    last = found[-1] if len(found) == limit else None
    return wire.Page(
        items=[wire.UsageOut.of(usage) for usage in found],
        next_cursor=None if last is None else wire.cursor_of(last.last_window_start_ms, last.id),
    )


@router.get("/me/nodes", tags=["Me"], responses=problems(*_NEEDS_TOKEN))
def list_bound_nodes(me: Me, accounts: InAccounts) -> wire.BoundNodes:
    """The nodes that are bound to me, the first to pay write-offs first."""
    return wire.BoundNodes.of(nodes.bound_to_user(accounts, me.user_id))


@router.put("/me/nodes", tags=["Me"], responses=problems(*_NEEDS_TOKEN, Reason.WRONG_ORDER))
def reorder_bound_nodes(body: wire.Order, me: Me, accounts: InAccounts) -> wire.BoundNodes:
    """Put the nodes that are bound to me into an order of priority."""
    return wire.BoundNodes.of(nodes.reorder(accounts, me, body.node_ids))


@router.delete(
    "/me/nodes/{node_id}",
    status_code=204,
    tags=["Me"],
    responses=problems(*_NEEDS_TOKEN, Reason.NOT_FOUND),
)
def unbind_node(node_id: NodeId, me: Me, accounts: InAccounts) -> None:
    """Unbind a node from me."""
    nodes.unbind(accounts, me.actor, node_id, me.user_id)


def statement_page(
    gateway: Gateway, account: str, limit: int, cursor: str | None
) -> wire.Page[wire.StatementLine]:
    """A page of an account's statement."""
    place = wire.place_of(cursor, int)
    lines = gateway.archive.statement(account, None if place is None else place[0], limit)
    more = len(lines) == limit and lines[-1].seq > 1
    return wire.Page(
        items=[wire.StatementLine.of(line) for line in lines],
        next_cursor=wire.cursor_of(lines[-1].seq) if more else None,
    )
