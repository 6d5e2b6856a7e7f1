"""Asking for money to be moved: top-ups and adjustments, each once for each request id.

Order of effects, for one request id:

1. One transaction writes what is asked for (`money_requests`) and its entry in the audit log.
2. The command is sent to Kafka and confirmed by all replicas.
3. The settlement flow carries it out, once for each request id for ever, and leaves the result in Redis and
   ClickHouse.
4. The caller is told that result.

A crash between 1 and 2 leaves a request that was never sent: it moved nothing. A crash between 2 and 3, or 3 and 4,
leaves a caller without an answer. In each case the caller repeats the same request with the same id: step 1
finds what is there and that it says the same, a result that exists is the answer, and else the command is
sent again, to which the flow gives the first result. What came of a request is stored nowhere here, so
nothing here can be wrong about it.

Whoever repeats an id with another body is refused by step 1, or, when the id was used elsewhere (`metering
topup`), by comparing the digest of the body with the one beside the result.

Operators' ids are used as they are. A node's are put under its name (`node:<node_id>:<id>`): else it could
use up an id that somebody else, or the write-off flow, is going to use.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import anyio.to_thread
import msgspec
from sqlalchemy.orm import Session

from accounts import audit
from accounts.audit import Action, Actor, ActorType
from accounts.context import Accounts
from accounts.database import insert_if_absent
from accounts.errors import Reason, Refused
from accounts.gateway import POLL_S, Gateway, RequestResult
from accounts.logins import Person
from accounts.models import Binding, MoneyRequest, Node, User
from accounts.nodes import NodeItself
from metering.commands import command_digest
from metering.money import node_account, user_account
from schemas.commands import ADJUSTED_TYPE, TOPPED_UP_TYPE, Command, CommandKind
from schemas.rfc3339 import format_rfc3339_ms
from telemetry import faults, metrics

SOURCE = "api/accounts"
_TYPES = {CommandKind.TOP_UP: TOPPED_UP_TYPE, CommandKind.ADJUSTMENT: ADJUSTED_TYPE}
_ACTIONS = {
    CommandKind.TOP_UP: Action.TOP_UP_REQUESTED,
    CommandKind.ADJUSTMENT: Action.ADJUSTMENT_REQUESTED,
}


class Status(StrEnum):
    """Where a request is."""

    PENDING = "pending"
    """Not carried out yet, as far as can be seen now."""
    APPLIED = "applied"
    OVER_LIMIT = "over_limit"
    INSUFFICIENT = "insufficient"
    CONFLICT = "conflict"
    """The id belongs to a request that says something else; this one will never be carried out."""


@dataclass(frozen=True)
class Asked:
    """A money command that was asked for."""

    kind: CommandKind
    account: str
    amount_us: int
    request_id: str
    reason: str
    actor: str
    node_account: str | None = None

    @property
    def digest(self) -> str:
        """What the flow will compute of its body."""
        return command_digest(
            Command(
                kind=self.kind,
                account=self.account,
                amount_us=self.amount_us,
                request_id=self.request_id,
                reason=self.reason,
                actor=self.actor,
                node_account=self.node_account,
                source=SOURCE,
                id=self.request_id,
                time_ms=0,
            )
        )

    def message(self, now_ms: int) -> bytes:
        """The CloudEvent for Kafka."""
        data = {
            "account": self.account,
            "amount_us": self.amount_us,
            "request_id": self.request_id,
            "reason": self.reason,
            "actor": self.actor,
        }
        if self.node_account is not None:
            data["paid_by"] = self.node_account
        return msgspec.json.encode(
            {
                "specversion": "1.0",
                "id": self.request_id,
                "source": SOURCE,
                "type": _TYPES[self.kind],
                "subject": self.account,
                "time": format_rfc3339_ms(now_ms),
                "data": data,
            }
        )


@dataclass(frozen=True)
class Answer:
    """What is known of a request. The amounts are of its result; None while there is none."""

    request_id: str
    status: Status
    account: str | None
    amount_us: int | None = None
    balance_us: int | None = None
    at_ms: int | None = None


def asked_by_operator(
    operator: Person, kind: CommandKind, account: str, amount_us: int, key: str, reason: str
) -> Asked:
    """An operator's top-up or adjustment of an account; `key` is the request id."""
    return Asked(kind, account, amount_us, key, reason, str(operator.actor))


def asked_by_node(node: NodeItself, user_id: str, amount_us: int, key: str, reason: str) -> Asked:
    """A node's top-up of a user from its own credit."""
    return Asked(
        CommandKind.TOP_UP,
        user_account(user_id),
        amount_us,
        f"node:{node.node_id}:{key}",
        reason,
        str(node.actor),
        node_account(node.node_id),
    )


def note(accounts: Accounts, asked: Asked, actor: Actor) -> bool:
    """Step 1; whether the request is new.

    Raises Refused: REQUEST_CONFLICT when the id was used with another body; NOT_FOUND when there is no such
    account, or it is not bound to the node that pays.
    """
    now_ms = accounts.now_ms()
    with accounts.database.write() as session:
        known = session.get(MoneyRequest, asked.request_id)
        if known is None:
            _require_account(session, asked)
            values = {
                "request_id": asked.request_id,
                "kind": asked.kind.value,
                "account": asked.account,
                "amount_us": asked.amount_us,
                "reason": asked.reason,
                "actor": asked.actor,
                "node_account": asked.node_account,
                "digest": asked.digest,
                "created_at_ms": now_ms,
            }
            new = insert_if_absent(session, MoneyRequest, values)
            if new:
                audit.record(
                    session,
                    actor,
                    _ACTIONS[asked.kind],
                    asked.account,
                    at_ms=now_ms,
                    request_id=asked.request_id,
                    payload={
                        "amount_us": asked.amount_us,
                        "reason": asked.reason,
                        "node_account": asked.node_account,
                    },
                )
                return True
            # Another process was faster with the same id: it has committed by now.
            known = session.get_one(MoneyRequest, asked.request_id)
        if known.digest != asked.digest:
            raise _conflict(asked.request_id)
        return False


async def carry_out(accounts: Accounts, gateway: Gateway, asked: Asked, actor: Actor) -> Answer:
    """All four steps. Waits `command_wait_s` for the result; without one the answer is PENDING.

    Raises Refused as `note` does, and COMMANDS_AWAY when Kafka did not confirm the command.
    """
    new = await anyio.to_thread.run_sync(note, accounts, asked, actor)
    if not new:
        # An answer that exists is given at once; a Redis or ClickHouse that is away is no reason not to send again.
        result = await anyio.to_thread.run_sync(partial(find_result, gateway, asked.request_id))
        if result is not None:
            return _answer(asked, result)
    faults.reach(faults.ACCOUNTS_REQUEST_NOTED)
    await asyncio.wrap_future(gateway.commands.send(asked.message(accounts.now_ms()), asked.account))
    faults.reach(faults.ACCOUNTS_COMMAND_SENT)
    deadline_s = time.monotonic() + accounts.config.command_wait_s
    while True:
        result = await anyio.to_thread.run_sync(_recent_result, gateway, asked.request_id)
        if result is not None or time.monotonic() >= deadline_s:
            break
        await asyncio.sleep(POLL_S)
    answer = (
        Answer(asked.request_id, Status.PENDING, asked.account) if result is None else _answer(asked, result)
    )
    metrics.ACCOUNTS_REQUESTS.labels(asked.kind.value, answer.status.value).inc()
    return answer


def status(accounts: Accounts, gateway: Gateway, request_id: str, *, asker: str | None) -> Answer:
    """What is known of a request: one's own, or any for an operator (`asker` None).

    Raises Refused: NOT_FOUND; BALANCES_AWAY or ARCHIVE_AWAY when no store that is there has the result.
    """
    with accounts.database.read() as session:
        known = session.get(MoneyRequest, request_id)
        if known is not None:
            session.expunge(known)
    if asker is not None and (known is None or known.actor != asker):
        raise Refused(Reason.NOT_FOUND, "there is no such request of yours")
    result = find_result(gateway, request_id, strict=True)
    if known is not None:
        if result is None:
            return Answer(request_id, Status.PENDING, known.account)
        return _judged(request_id, known.account, known.digest, result)
    if result is None:
        raise Refused(Reason.NOT_FOUND, "there is no such request")
    return _judged(request_id, None, result.digest, result)


def find_result(gateway: Gateway, request_id: str, *, strict: bool = False) -> RequestResult | None:
    """The result, from Redis or, when it is old, from ClickHouse. `strict`: a store that is away raises
    Refused unless the other one has it.
    """
    away: Refused | None = None
    for find in (gateway.balances.result, gateway.archive.result):
        try:
            result = find(request_id)
        except Refused as refusal:
            away = refusal
        else:
            if result is not None:
                return result
    if strict and away is not None:
        raise away
    return None


def _recent_result(gateway: Gateway, request_id: str) -> RequestResult | None:
    try:
        return gateway.balances.result(request_id)
    except Refused:
        return None


def _answer(asked: Asked, result: RequestResult) -> Answer:
    answer = _judged(asked.request_id, asked.account, asked.digest, result)
    if answer.status is Status.CONFLICT:
        raise _conflict(asked.request_id)
    return answer


def _judged(request_id: str, account: str | None, digest: str, result: RequestResult) -> Answer:
    if result.digest != digest:
        return Answer(request_id, Status.CONFLICT, account)
    return Answer(
        request_id, Status(result.outcome.lower()), account, result.amount_us, result.balance_us, result.at_ms
    )


def _require_account(session: Session, asked: Asked) -> None:
    kind, _, account_id = asked.account.partition("/")
    if asked.node_account is not None:
        node_id = asked.node_account.partition("/")[2]
        if session.get(Binding, (node_id, account_id)) is None:
            raise Refused(Reason.NOT_FOUND, "the node is not bound to this user")
    elif session.get(User if kind == ActorType.USER else Node, account_id) is None:
        raise Refused(Reason.NOT_FOUND, f"there is no {kind} {account_id}")


def _conflict(request_id: str) -> Refused:
    return Refused(
        Reason.REQUEST_CONFLICT, f"the request id {request_id} was used with another body; take a new one"
    )
