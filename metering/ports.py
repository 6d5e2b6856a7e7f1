"""The port through which settlement moves money, so that a flow runs alike on Redis and on its twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from metering.commands import CommandResult
from metering.live import Answer, Emission
from schemas.commands import Command
from schemas.messages import OutboxMessage


class WrongRedis(Exception):
    """The book is not the one that the caller means: its epoch is missing or another. One clear line."""


class BalanceBook(Protocol):
    """Keeps balances, cells' last vectors, requests and the fence; appends ledger lines to the outbox.

    All methods are idempotent and block until they are done: they wait while the server is away or the outbox
    is full. They raise WrongRedis when the epoch is not the expected one, and then nothing was done.
    """

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        """Post cells and endings; the answers stand in the order of each emission's cells."""

    def apply_command(self, command: Command) -> CommandResult:
        """Carry out a money command once."""

    def raise_fence(self, frozen_before_ms: int) -> int:
        """Raise the fence, if that is higher, and forget frozen cells; returns where it stands (ms)."""

    @property
    def known_fence_ms(self) -> int:
        """Where the fence stood at the last answer; costs no round trip."""


class Outbox(Protocol):
    """The stream that scripts append to, from the side of its one reader. Methods block while it is away."""

    def trim(self, stored_id: bytes) -> int:
        """Forget entries up to `stored_id` that are past the retention; returns how many entries are left."""

    def set_aside(self, message: OutboxMessage, why: str) -> None:
        """Keep an entry that nobody can read where trimming does not reach it."""
