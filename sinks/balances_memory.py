"""The balance book in memory: the twin of `sinks.balances`, for tests and simulations.

It answers as the scripts do and keeps an outbox of the same entries; one contract suite holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from metering.commands import CommandOutcome, CommandResult, command_digest, counter_account
from metering.live import Answer, CellPosting, Emission
from metering.money import MAX_AMOUNT_US, REVENUE
from metering.outbox import OutboxEntry, parse_entry
from metering.ports import WrongRedis
from schemas.commands import Command, CommandKind

MAX_BALANCE_US = 10**18
"""Balances keep below this magnitude: 18 digits, well within 64 bits."""

_REASONS = {"u": "charge", "n": "credit", "p": "revenue"}


@dataclass
class Account:
    """One balance and the number of its last ledger line."""

    balance_us: int = 0
    seq: int = 0


@dataclass
class _Record:
    revision: int = -1
    amounts: dict[str, int] = field(default_factory=dict)


class MemoryBalances:
    """A balance book that lives and dies with the process. `now_ms` stands in for Redis' clock."""

    def __init__(self, epoch: int = 1, now_ms: Callable[[], int] = lambda: 0) -> None:
        self.epoch = epoch
        self.expected_epoch = epoch
        self.accounts: dict[str, Account] = {}
        self.outbox: list[OutboxEntry] = []
        self._now_ms = now_ms
        self._fence_ms = 0
        self._cells: dict[str, tuple[int, _Record]] = {}
        self._requests: dict[str, tuple[str, CommandResult]] = {}

    @property
    def known_fence_ms(self) -> int:
        return self._fence_ms

    def balances(self) -> dict[str, int]:
        """Every account's balance (us)."""
        return {name: account.balance_us for name, account in self.accounts.items()}

    def live_cells(self) -> set[str]:
        """The cells whose records are kept."""
        return set(self._cells)

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        self._check_epoch()
        answers = []
        lines: list[list[object]] = []
        cells: list[list[object]] = []
        endings: list[list[object]] = []
        for emission in emissions:
            answers.append([self._post_cell(cell, lines, cells) for cell in emission.cells])
            if (ending := emission.ending) is not None:
                times = [ending.first_event_ms, ending.last_event_ms]
                endings.append([emission.scope, ending.reason, *times, ending.revision])
        if lines or endings:
            self._append({"cells": cells, "lines": lines, "endings": endings})
        return answers

    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        if sum(map(abs, cell.amounts.values())) > MAX_AMOUNT_US:
            return Answer.OVER_LIMIT
        if cell.window_start_ms < self._fence_ms:
            return Answer.FROZEN
        _, known = self._cells.get(cell.cell_id, (0, _Record()))
        if cell.revision < known.revision:
            return Answer.OLDER
        if cell.revision == known.revision:
            return Answer.POSTED if cell.amounts == known.amounts else Answer.OLDER
        gone = sorted(known.amounts.keys() - cell.amounts.keys())
        named = sorted(cell.amounts)
        changes = {
            account: cell.amounts.get(account, 0) - known.amounts.get(account, 0)
            for account in [*named, *gone]
        }
        changes[REVENUE] = -sum(changes.values())
        changes = {account: change for account, change in changes.items() if change}
        if any(
            abs(self._account(name).balance_us + change) >= MAX_BALANCE_US for name, change in changes.items()
        ):
            return Answer.OVER_LIMIT
        for name, change in changes.items():
            lines.append([*self._move(name, change), _REASONS[name[0]], len(cells)])
        if changes:
            cells.append([cell.cell_id, cell.revision, cell.rate_version])
        self._cells[cell.cell_id] = (cell.window_start_ms, _Record(cell.revision, dict(cell.amounts)))
        return Answer.POSTED

    def apply_command(self, command: Command) -> CommandResult:
        self._check_epoch()
        digest = command_digest(command)
        known = self._requests.get(command.request_id)
        if known is not None:
            if known[0] != digest:
                return known[1]._replace(outcome=CommandOutcome.CONFLICT)
            if known[1].outcome is CommandOutcome.APPLIED:
                return known[1]._replace(outcome=CommandOutcome.REPLAYED)
            return known[1]
        name, counter = command.account, counter_account(command)
        account, other = self._account(name), self._account(counter)
        amount_us, outcome = command.amount_us, CommandOutcome.APPLIED
        if command.kind is CommandKind.WRITE_OFF:
            amount_us = max(0, min(amount_us, -account.balance_us, other.balance_us))
        if amount_us and (
            name == counter
            or abs(account.balance_us + amount_us) >= MAX_BALANCE_US
            or abs(other.balance_us - amount_us) >= MAX_BALANCE_US
        ):
            amount_us, outcome = 0, CommandOutcome.OVER_LIMIT
        if amount_us:
            lines = [
                [*self._move(name, amount_us), command.kind.value, 0],
                [*self._move(counter, -amount_us), command.kind.value, 0],
            ]
            self._append({"command": [command.request_id, command.actor, command.reason], "lines": lines})
        result = CommandResult(outcome, amount_us, account.balance_us)
        self._requests[command.request_id] = (digest, result)
        return result

    def raise_fence(self, frozen_before_ms: int) -> int:
        self._check_epoch()
        if frozen_before_ms > self._fence_ms:
            self._fence_ms = frozen_before_ms
            self._append({"fence": frozen_before_ms})
        for cell_id in [cell_id for cell_id, (start, _) in self._cells.items() if start < self._fence_ms]:
            del self._cells[cell_id]
        return self._fence_ms

    def _check_epoch(self) -> None:
        if self.epoch != self.expected_epoch:
            raise WrongRedis(f"EPOCH expected {self.expected_epoch}, found {self.epoch}")

    def _account(self, name: str) -> Account:
        return self.accounts.setdefault(name, Account())

    def _move(self, name: str, change_us: int) -> list[object]:
        account = self._account(name)
        before_us = account.balance_us
        account.balance_us += change_us
        account.seq += 1
        return [name, account.seq, str(change_us), str(before_us), str(account.balance_us)]

    def _append(self, fields: dict[str, object]) -> None:
        entry = {b"epoch": b"%d" % self.epoch, b"at": b"%d" % self._now_ms()}
        entry |= {name.encode(): json.dumps(value).encode() for name, value in fields.items()}
        self.outbox.append(parse_entry(entry))
