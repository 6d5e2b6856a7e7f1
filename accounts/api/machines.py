"""Endpoints for nodes: their credentials, which a person looks after, and what a node asks for itself."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from accounts import money, nodes
from accounts.api import wire
from accounts.api.deps import (
    Address,
    Cursor,
    IdempotencyKey,
    InAccounts,
    InGateway,
    Limit,
    Me,
    NodeId,
    TheNode,
    UserId,
)
from accounts.api.docs import problems
from accounts.api.people import statement_page
from accounts.api.requests import MONEY_PROBLEMS, MONEY_RESPONSES, money_answer
from accounts.errors import Reason
from metering.money import node_account, user_account

router = APIRouter(prefix="/v1")

_NEEDS_TOKEN = (Reason.BAD_TOKEN, Reason.FORBIDDEN)


@router.post(
    "/nodes",
    status_code=201,
    tags=["Nodes"],
    responses=problems(*_NEEDS_TOKEN, Reason.NODE_ID_TAKEN, Reason.TOO_MANY),
)
def register_node(body: wire.RegisterNode, me: Me, accounts: InAccounts, response: Response) -> wire.NewNode:
    """Register a node of mine. Its secret is shown this once."""
    response.headers["Cache-Control"] = "no-store"
    node, secret = nodes.register(accounts, me, body.name, body.node_id)
    return wire.NewNode(**wire.NodeOut.of(node).model_dump(), client_id=node.node_id, client_secret=secret)


@router.get("/nodes", tags=["Nodes"], responses=problems(*_NEEDS_TOKEN))
def list_nodes(me: Me, accounts: InAccounts) -> wire.Nodes:
    """The nodes that I registered."""
    return wire.Nodes(items=[wire.NodeOut.of(node) for node in nodes.owned_by(accounts, me.user_id)])


@router.post(
    "/nodes/token",
    tags=["Nodes"],
    responses=problems(Reason.BAD_CREDENTIALS, Reason.TOO_MANY_ATTEMPTS),
)
def issue_node_token(
    body: wire.NodeCredentials, accounts: InAccounts, address: Address, response: Response
) -> wire.NodeToken:
    """Exchange a node's credentials for an access token."""
    response.headers["Cache-Control"] = "no-store"
    token = nodes.issue_token(accounts, body.client_id, body.client_secret, address)
    return wire.NodeToken(access_token=token, expires_in=accounts.config.access_token_s)


@router.post(
    "/nodes/{node_id}/secret",
    tags=["Nodes"],
    responses=problems(*_NEEDS_TOKEN, Reason.NOT_FOUND),
)
def replace_node_secret(node_id: NodeId, me: Me, accounts: InAccounts, response: Response) -> wire.NewSecret:
    """Replace the secret of a node of mine. The old one, and its tokens, end at once."""
    response.headers["Cache-Control"] = "no-store"
    secret = nodes.replace_secret(accounts, me, node_id)
    return wire.NewSecret(client_id=node_id, client_secret=secret)


@router.get("/node", tags=["A node itself"], responses=problems(*_NEEDS_TOKEN))
def get_node(node: TheNode, accounts: InAccounts) -> wire.NodeOut:
    """This node."""
    return wire.NodeOut.of(nodes.shown(accounts, node.node_id))


@router.get("/node/balance", tags=["A node itself"], responses=problems(*_NEEDS_TOKEN, Reason.BALANCES_AWAY))
def get_node_balance(node: TheNode, gateway: InGateway) -> wire.BalanceOut:
    """This node's live credit."""
    account = node_account(node.node_id)
    return wire.BalanceOut.of(gateway.balances.read([account])[account])


@router.get(
    "/node/statement",
    tags=["A node itself"],
    responses=problems(*_NEEDS_TOKEN, Reason.ARCHIVE_AWAY, Reason.BAD_CURSOR),
)
def get_node_statement(
    node: TheNode, gateway: InGateway, limit: Limit = 50, cursor: Cursor = None
) -> wire.Page[wire.StatementLine]:
    """Every change of this node's credit, the newest first."""
    return statement_page(gateway, node_account(node.node_id), limit, cursor)


@router.post(
    "/node/users",
    status_code=201,
    tags=["A node itself"],
    responses=problems(
        *_NEEDS_TOKEN, Reason.WRONG_CODE, Reason.ALREADY_BOUND, Reason.TOO_MANY, Reason.TOO_MANY_ATTEMPTS
    ),
)
def bind(body: wire.EnterCode, node: TheNode, accounts: InAccounts, address: Address) -> wire.BoundUserOut:
    """Bind this node to a user by their security code. Wrong ones are counted and soon refused."""
    return wire.BoundUserOut.of(nodes.bind(accounts, node, body.security_code, address))


@router.get("/node/users", tags=["A node itself"], responses=problems(*_NEEDS_TOKEN, Reason.BALANCES_AWAY))
def list_bound_users(node: TheNode, accounts: InAccounts, gateway: InGateway) -> wire.BoundUsers:
    """The users whom this node is bound to, with their live balances."""
    bound = nodes.bound_to_node(accounts, node.node_id)
    balances = gateway.balances.read([user_account(user.user_id) for user in bound])
    return wire.BoundUsers(
        items=[
            wire.BoundUserBalance(
                **wire.BoundUserOut.of(user).model_dump(),
                balance=wire.BalanceOut.of(balances[user_account(user.user_id)]),
            )
            for user in bound
        ]
    )


@router.delete(
    "/node/users/{user_id}",
    status_code=204,
    tags=["A node itself"],
    responses=problems(*_NEEDS_TOKEN, Reason.NOT_FOUND),
)
def unbind(user_id: UserId, node: TheNode, accounts: InAccounts) -> None:
    """Unbind this node from a user."""
    nodes.unbind(accounts, node.actor, node.node_id, user_id)


@router.post(
    "/node/users/{user_id}/top-ups",
    tags=["A node itself"],
    response_model=wire.MoneyAnswer,
    responses=problems(*_NEEDS_TOKEN, *MONEY_PROBLEMS, Reason.INSUFFICIENT_CREDIT) | MONEY_RESPONSES,
)
async def top_up_from_credit(
    user_id: UserId,
    body: wire.TopUp,
    key: IdempotencyKey,
    node: TheNode,
    accounts: InAccounts,
    gateway: InGateway,
) -> JSONResponse:
    """Top up a bound user from this node's credit: all of it, or nothing when the credit is less."""
    asked = money.asked_by_node(node, user_id, wire.amount_us(body.minutes), key, body.reason)
    return money_answer(await money.carry_out(accounts, gateway, asked, node.actor))
