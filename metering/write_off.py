"""Write-off: users below zero are paid for from the credit of the nodes bound to them.

Laws:
- The deepest debt comes first; of a user's nodes the one that stands first pays first. Nobody gets more than
  the debt, no node gives more than its credit. The plan is made of balances that go on moving; that it is kept
  all the same is the script's doing, which clamps each transfer to debt and credit when it carries it out.
- A transfer is named by period, user and node, and so is its request id: whoever sends it again sends the same
  bytes, and it is carried out once.
- Order of effects: the plan of a period is written down whole; its commands are sent; once the first result of
  one is in the ledger, the transfer is closed together with its entry in the audit log. Killed before the plan is
  written, nothing has happened. Killed after it, the next run, of whatever period, sends again what is open,
  and closes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple, Protocol

from metering.money import node_account, user_account
from schemas.commands import MAX_AMOUNT_US, WRITTEN_OFF_TYPE, WriteOffData, WrittenOff
from schemas.rfc3339 import format_rfc3339_ms

SOURCE = "lingua/write_off"
ACTOR = "system/write_off"


class Transfer(NamedTuple):
    """What a node is to pay for a user, at most."""

    period_ms: int
    user_id: str
    node_id: str
    amount_us: int

    @property
    def request_id(self) -> str:
        """The same for the same period, user and node. Ids may be long: what stands for them is not."""
        whom = blake2b(f"{self.user_id}|{self.node_id}".encode(), digest_size=16).hexdigest()
        return f"write-off:{self.period_ms}:{whom}"


class TransferResult(NamedTuple):
    """What came of a transfer: the first result of its request, as the ledger has it for good. What only Redis
    knows may be lost with its end, and come out otherwise the next time."""

    outcome: str
    amount_us: int
    """That was moved."""
    balance_us: int
    """Of the user, afterwards."""


class WriteOffBook(Protocol):
    """Who pays for whom, and which transfers are planned and open. Methods block and raise the store's errors;
    each is one transaction."""

    def bound_nodes(self, user_ids: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """For each of these users who has bound nodes: their ids, the one that pays first first."""

    def is_planned(self, period_ms: int) -> bool:
        """Whether the plan of a period is written down."""

    def plan(self, period_ms: int, transfers: Sequence[Transfer]) -> None:
        """Write the plan of a period down, whole, unless there is one."""

    def open_transfers(self) -> Sequence[Transfer]:
        """Those that were planned and not closed, of all periods, in the order of their plans."""

    def close(self, transfer: Transfer, result: TransferResult) -> None:
        """Close a transfer and enter it in the audit log; a closed one stays as it is."""


class Step(StrEnum):
    """Where the procedure stands when it lets its driver go on."""

    PLANNED = "planned"
    SENT = "sent"
    WAITING = "waiting"
    """The ledger does not have all of it: call again in a moment."""
    CLOSED_ONE = "closed one"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run did. `open` transfers were sent and have no result yet: the next run closes them."""

    period_ms: int
    closed: int
    moved_us: int
    open: int


def plan(
    period_ms: int,
    balances_us: Mapping[str, int],
    bound_nodes: Mapping[str, Sequence[str]],
    credits_us: Mapping[str, int],
) -> list[Transfer]:
    """The transfers of a period, in the order in which they are to be carried out. Balances are users', credits are
    nodes' (us); of users who owe the same the smaller id comes first."""
    left = dict(credits_us)
    transfers = []
    for balance_us, user_id in sorted((balance_us, user_id) for user_id, balance_us in balances_us.items()):
        debt_us = -balance_us
        for node_id in bound_nodes.get(user_id, ()):
            amount_us = min(debt_us, left.get(node_id, 0), MAX_AMOUNT_US)
            if amount_us > 0:
                transfers.append(Transfer(period_ms, user_id, node_id, amount_us))
                debt_us -= amount_us
                left[node_id] -= amount_us
    return transfers


def command_of(transfer: Transfer) -> WrittenOff:
    """The money command of a transfer: the same for the same transfer, whenever it is made."""
    return WrittenOff(
        specversion="1.0",
        id=transfer.request_id,
        source=SOURCE,
        type=WRITTEN_OFF_TYPE,
        time=format_rfc3339_ms(transfer.period_ms),
        data=WriteOffData(
            account=user_account(transfer.user_id),
            amount_us=transfer.amount_us,
            request_id=transfer.request_id,
            reason="debt written off by a bound node",
            actor=ACTOR,
            node_account=node_account(transfer.node_id),
        ),
    )


def write_off(
    period_ms: int,
    book: WriteOffBook,
    debts: Callable[[], Mapping[str, int]],
    credits: Callable[[Sequence[str]], Mapping[str, int]],
    send: Callable[[Sequence[Transfer]], None],
    results: Callable[[Sequence[Transfer]], Mapping[str, TransferResult]],
    *,
    tired_of_waiting: Callable[[], bool],
) -> Generator[Step, None, Run]:
    """One run. `debts()` are the balances (us) below zero by user, `credits` the nodes' balances (us); `send`
    returns when every command is stored in the log; `results` knows, by request id, what is in the ledger."""
    if not book.is_planned(period_ms):
        balances_us = debts()
        bound = book.bound_nodes(sorted(balances_us))
        nodes = sorted({node_id for nodes in bound.values() for node_id in nodes})
        book.plan(period_ms, plan(period_ms, balances_us, bound, credits(nodes) if nodes else {}))
    yield Step.PLANNED
    waiting = list(book.open_transfers())
    if waiting:
        send(waiting)
    yield Step.SENT
    closed = moved_us = 0
    while waiting:
        known = results(waiting)
        for transfer in waiting:
            if transfer.request_id in known:
                result = known[transfer.request_id]
                book.close(transfer, result)
                closed += 1
                moved_us += result.amount_us
                yield Step.CLOSED_ONE
        waiting = [transfer for transfer in waiting if transfer.request_id not in known]
        if waiting and tired_of_waiting():
            break
        if waiting:
            yield Step.WAITING
    return Run(period_ms, closed, moved_us, len(waiting))
