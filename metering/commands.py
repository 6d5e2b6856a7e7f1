"""Money commands: what each one moves, and when two of them say the same."""

from __future__ import annotations

import json
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple

from metering.money import ADJUSTMENTS, TOP_UPS
from schemas.commands import Command, CommandKind


class CommandOutcome(StrEnum):
    """What became of a money command."""

    APPLIED = "APPLIED"
    REPLAYED = "REPLAYED"
    """The request id was carried out before, with the same body: nothing moved now."""
    CONFLICT = "CONFLICT"
    """The request id was carried out before, with another body: nothing moved."""
    OVER_LIMIT = "OVER_LIMIT"
    """A balance would leave its range, or both halves name one account: nothing moved."""
    INSUFFICIENT = "INSUFFICIENT"
    """The node that should pay has less than the amount: nothing moved."""
    ARCHIVED = "ARCHIVED"
    """As REPLAYED, but so long ago that only the ledger knows the first result; the amounts here are 0."""


FINAL_REFUSALS = frozenset({CommandOutcome.OVER_LIMIT, CommandOutcome.INSUFFICIENT})
"""First results that a repeat is answered with as they are."""


class CommandResult(NamedTuple):
    """`amount_us` is what was moved (a write-off may be clamped); `balance_us` the account's balance then.
    A replay gives the first result."""

    outcome: CommandOutcome
    amount_us: int
    balance_us: int


def command_digest(command: Command) -> str:
    """Equal for two commands that say the same: everything but the envelope's id, source and time."""
    body: list[str | int | None] = [
        command.kind,
        command.account,
        command.amount_us,
        command.reason,
        command.actor,
    ]
    body.append(command.node_account)
    if command.grant is not None:
        body += command.grant
    return blake2b(json.dumps(body).encode(), digest_size=16).hexdigest()


def counter_account(command: Command) -> str:
    """The account that balances the posting, so that the sum over all accounts stays zero."""
    if command.node_account is not None:
        return command.node_account
    if command.kind is CommandKind.WRITE_OFF:
        raise ValueError(f"write-off {command.request_id} names no node account")
    return TOP_UPS if command.kind is CommandKind.TOP_UP else ADJUSTMENTS
