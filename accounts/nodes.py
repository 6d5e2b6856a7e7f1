"""Nodes: credentials, and bindings to users by their security code.

A user's nodes are in an order of priority: the first one pays write-offs first. Whoever changes the order of
a user's bindings holds the user's row, so positions stay 1, 2, 3, ... whatever happens at once.
"""

from __future__ import annotations

import hmac
import secrets as random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from ulid import ULID

from accounts import audit, security_codes
from accounts.attempts import Guarded, address_key
from accounts.audit import Action, Actor, ActorType
from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.logins import Person
from accounts.models import Binding, Node, User
from accounts.tokens import Claims, SubjectKind

SECRET_PREFIX = "lmn_"
MAX_NODES_OF_OWNER = 100
MAX_BINDINGS = 1_000
"""Of one node, and of one user: a page of balances is one round trip to Redis."""


@dataclass(frozen=True)
class NodeShown:
    """A node, for its owner, an operator or itself."""

    node_id: str
    name: str
    owner_id: str
    created_at_ms: int


@dataclass(frozen=True)
class BoundNode:
    """A node that is bound to a user; position 1 pays first."""

    node_id: str
    name: str
    position: int
    bound_at_ms: int


@dataclass(frozen=True)
class BoundUser:
    """A user whom a node is bound to."""

    user_id: str
    username: str
    display_name: str
    bound_at_ms: int


@dataclass(frozen=True)
class NodeItself:
    """Who a valid access token of a node speaks for."""

    node_id: str
    owner_id: str

    @property
    def actor(self) -> Actor:
        """As the audit log names it."""
        return Actor(ActorType.NODE, self.node_id)


def register(accounts: Accounts, owner: Person, name: str, node_id: str | None) -> tuple[NodeShown, str]:
    """A new node and its secret, which is shown this once.

    An id of its own choosing is for operators: it names the account whose credit the node's events earn.
    Raises Refused: FORBIDDEN, NODE_ID_TAKEN, TOO_MANY.
    """
    if node_id is not None and owner.role != "operator":
        raise Refused(Reason.FORBIDDEN, "only an operator chooses a node's id")
    now_ms = accounts.now_ms()
    secret = SECRET_PREFIX + random.token_urlsafe(32)
    node = Node(
        node_id=node_id or str(ULID()).lower(),
        name=name,
        owner_id=owner.user_id,
        secret_hash=_hash(secret),
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
    )
    shown = _shown(node)
    try:
        with accounts.database.write() as session:
            session.get(User, owner.user_id, with_for_update=True)
            owned = session.scalar(
                select(func.count()).select_from(Node).where(Node.owner_id == owner.user_id)
            )
            if owner.role != "operator" and (owned or 0) >= MAX_NODES_OF_OWNER:
                raise Refused(Reason.TOO_MANY, f"a user may own {MAX_NODES_OF_OWNER} nodes")
            session.add(node)
            session.flush()
            _record(session, accounts, owner.actor, Action.NODE_REGISTERED, shown.node_id)
    except IntegrityError:
        raise Refused(Reason.NODE_ID_TAKEN, "there is a node with this id") from None
    return shown, secret


def replace_secret(accounts: Accounts, person: Person, node_id: str) -> str:
    """A new secret for a node of this owner (or, for an operator, any node). Tokens of the old one end at once."""
    secret = SECRET_PREFIX + random.token_urlsafe(32)
    with accounts.database.write() as session:
        node = _owned(session, person, node_id)
        node.secret_hash, node.updated_at_ms = _hash(secret), accounts.now_ms()
        _record(session, accounts, person.actor, Action.NODE_SECRET_REPLACED, node_id)
    return secret


def owned_by(accounts: Accounts, user_id: str) -> list[NodeShown]:
    """The nodes that a user registered, the oldest first."""
    with accounts.database.read() as session:
        query = select(Node).where(Node.owner_id == user_id).order_by(Node.created_at_ms, Node.node_id)
        return [_shown(node) for node in session.scalars(query)]


def issue_token(accounts: Accounts, client_id: str, client_secret: str, address: str) -> str:
    """An access token for a node. Raises Refused: BAD_CREDENTIALS, TOO_MANY_ATTEMPTS."""
    now_ms = accounts.now_ms()
    counted = accounts.attempts.count(
        [(Guarded.NODE_TOKEN_NODE, client_id), (Guarded.NODE_TOKEN_ADDRESS, address_key(address))], now_ms
    )
    given = _hash(client_secret)
    with accounts.database.read() as session:
        known = session.scalar(select(Node.secret_hash).where(Node.node_id == client_id))
    if not hmac.compare_digest(given, known or "0" * len(given)):
        raise Refused(Reason.BAD_CREDENTIALS, "the client id or the secret is not right")
    accounts.attempts.take_back(counted)
    return accounts.tokens.issue(SubjectKind.NODE, client_id, "node", _mark(given), now_ms)


def itself(accounts: Accounts, claims: Claims) -> NodeItself:
    """Who this token speaks for. Raises Refused, BAD_TOKEN, when its secret was replaced."""
    if claims.kind is not SubjectKind.NODE:
        raise Refused(Reason.FORBIDDEN, "this is for nodes; the token is a user's")
    with accounts.database.read() as session:
        node = session.get(Node, claims.subject_id)
        if node is None or not hmac.compare_digest(_mark(node.secret_hash), claims.session):
            raise Refused(Reason.BAD_TOKEN, "the node's secret was replaced")
        return NodeItself(node.node_id, node.owner_id)


def shown(accounts: Accounts, node_id: str) -> NodeShown:
    """Raises Refused, NOT_FOUND."""
    with accounts.database.read() as session:
        node = session.get(Node, node_id)
        if node is None:
            raise Refused(Reason.NOT_FOUND, "there is no such node")
        return _shown(node)


def bind(accounts: Accounts, node: NodeItself, entered: str, address: str) -> BoundUser:
    """Bind the node to the user whose security code was entered; last in that user's order.

    Every try counts, also what can be no code. Raises Refused: WRONG_CODE, TOO_MANY_ATTEMPTS, ALREADY_BOUND,
    TOO_MANY.
    """
    now_ms = accounts.now_ms()
    counted = accounts.attempts.count(
        [
            (Guarded.CODE_NODE, node.node_id),
            (Guarded.CODE_OWNER, node.owner_id),
            (Guarded.CODE_ADDRESS, address_key(address)),
        ],
        now_ms,
    )
    code = security_codes.canonical(entered)
    mac = accounts.secrets.mac(security_codes.MAC_PURPOSE, code or "")
    with accounts.database.write() as session:
        # Locked: a code that is being replaced is the old one or the new one, and positions are given one by one.
        user = session.scalar(select(User).where(User.security_code_mac == mac).with_for_update())
        if user is None or code is None or not hmac.compare_digest(user.security_code_mac, mac):
            raise Refused(Reason.WRONG_CODE, "this is nobody's security code")
        if session.get(Binding, (node.node_id, user.user_id)) is not None:
            raise Refused(Reason.ALREADY_BOUND, "the node is bound to this user already")
        theirs, last = session.execute(
            select(func.count(), func.coalesce(func.max(Binding.position), 0)).where(
                Binding.user_id == user.user_id
            )
        ).one()
        ours = session.scalar(
            select(func.count()).select_from(Binding).where(Binding.node_id == node.node_id)
        )
        if theirs >= MAX_BINDINGS or (ours or 0) >= MAX_BINDINGS:
            raise Refused(Reason.TOO_MANY, f"{MAX_BINDINGS} bindings are the most")
        session.add(
            Binding(node_id=node.node_id, user_id=user.user_id, position=last + 1, bound_at_ms=now_ms)
        )
        _record(session, accounts, node.actor, Action.NODE_BOUND, node.node_id, {"user_id": user.user_id})
        bound = BoundUser(user.user_id, user.username, user.display_name, now_ms)
    accounts.attempts.take_back(counted)
    return bound


def unbind(accounts: Accounts, actor: Actor, node_id: str, user_id: str) -> None:
    """End a binding; those behind it move up. Raises Refused, NOT_FOUND."""
    with accounts.database.write() as session:
        session.get(User, user_id, with_for_update=True)
        binding = session.get(Binding, (node_id, user_id))
        if binding is None:
            raise Refused(Reason.NOT_FOUND, "the node is not bound to this user")
        session.delete(binding)
        session.flush()
        _number(session, user_id, [bound.node_id for bound in _bindings(session, user_id)])
        _record(session, accounts, actor, Action.NODE_UNBOUND, node_id, {"user_id": user_id})


def reorder(accounts: Accounts, person: Person, node_ids: Sequence[str]) -> list[BoundNode]:
    """Put the user's nodes into this order. Raises Refused, WRONG_ORDER, unless it names each bound node once."""
    with accounts.database.write() as session:
        session.get(User, person.user_id, with_for_update=True)
        bound = {binding.node_id for binding in _bindings(session, person.user_id)}
        if len(node_ids) != len(bound) or set(node_ids) != bound:
            raise Refused(Reason.WRONG_ORDER, "an order names every node that is bound to you, each once")
        _number(session, person.user_id, node_ids)
        _record(
            session,
            accounts,
            person.actor,
            Action.NODES_REORDERED,
            "",
            {"node_ids": list(node_ids)},
            target=f"user/{person.user_id}",
        )
    return bound_to_user(accounts, person.user_id)


def bound_to_user(accounts: Accounts, user_id: str) -> list[BoundNode]:
    """The nodes that are bound to a user, the first to pay first."""
    with accounts.database.read() as session:
        rows = session.execute(
            select(Binding, Node.name)
            .join(Node, Node.node_id == Binding.node_id)
            .where(Binding.user_id == user_id)
            .order_by(Binding.position)
        )
        return [
            BoundNode(binding.node_id, name, binding.position, binding.bound_at_ms) for binding, name in rows
        ]


def bound_to_node(accounts: Accounts, node_id: str) -> list[BoundUser]:
    """The users whom a node is bound to, the longest first."""
    with accounts.database.read() as session:
        rows = session.execute(
            select(Binding, User.username, User.display_name)
            .join(User, User.user_id == Binding.user_id)
            .where(Binding.node_id == node_id)
            .order_by(Binding.bound_at_ms, Binding.user_id)
        )
        return [
            BoundUser(binding.user_id, username, display_name, binding.bound_at_ms)
            for binding, username, display_name in rows
        ]


def _bindings(session: Session, user_id: str) -> list[Binding]:
    return list(session.scalars(select(Binding).where(Binding.user_id == user_id).order_by(Binding.position)))


def _number(session: Session, user_id: str, node_ids: Sequence[str]) -> None:
    # Two steps: no two rows may have one position even in the middle of this.
    for sign in (-1, 1):
        for position, node_id in enumerate(node_ids, 1):
            session.execute(
                update(Binding)
                .where(Binding.user_id == user_id, Binding.node_id == node_id)
                .values(position=sign * position)
            )


def _owned(session: Session, person: Person, node_id: str) -> Node:
    node = session.get(Node, node_id, with_for_update=True)
    # Whose node it is, is nobody else's business: the same answer as for one that is not there.
    if node is None or (node.owner_id != person.user_id and person.role != "operator"):
        raise Refused(Reason.NOT_FOUND, "there is no such node of yours")
    return node


def _record(
    session: Session,
    accounts: Accounts,
    actor: Actor,
    action: Action,
    node_id: str,
    payload: dict[str, object] | None = None,
    *,
    target: str | None = None,
) -> None:
    audit.record(
        session, actor, action, target or f"node/{node_id}", at_ms=accounts.now_ms(), payload=payload
    )


def _shown(node: Node) -> NodeShown:
    return NodeShown(node.node_id, node.name, node.owner_id, node.created_at_ms)


def _hash(secret: str) -> str:
    # 256 random bits need no salt and no slow hash.
    return sha256(secret.encode()).hexdigest()


def _mark(secret_hash: str) -> str:
    """Names a secret in the tokens that were issued for it."""
    return sha256(f"mark {secret_hash}".encode()).hexdigest()[:24]
