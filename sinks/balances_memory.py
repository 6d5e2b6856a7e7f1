"""The balance book in memory: the twin of `sinks.balances`, for tests and simulations.

It answers as the scripts do and keeps an outbox of the same entries; one contract suite holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from metering.commands import CommandOutcome, CommandResult, command_digest, counter_account
from metering.facts import Correction
from metering.grants import MAX_GRANTS, Grant, Grants
from metering.live import Answer, CellPosting, Emission
from metering.money import ADJUSTMENTS, MAX_AMOUNT_US, REVENUE
from metering.outbox import OutboxEntry, parse_entry
from metering.ports import NOTHING_SEEN, CorrectionAnswer, ResettleTicket, SeenEntry, WrongRedis
from schemas.commands import Command, CommandKind
from schemas.records import Threshold
from schemas.redis_keys import DEFAULT_FLOOR_US, LOW_US

MAX_BALANCE_US = 10**18
"""Balances keep below this magnitude: 18 digits, well within 64 bits."""

_REASONS = {"u": "charge", "n": "credit", "p": "revenue"}


@dataclass
class Account:
    """One balance and the number of its last ledger line."""

    balance_us: int = 0
    seq: int = 0
    floor_us: int = DEFAULT_FLOOR_US
    grants: Grants | None = None


@dataclass
class _Record:
    revision: int = -1
    amounts: dict[str, int] = field(default_factory=dict)


@dataclass
class MemoryRedis:
    """What Redis keeps: it outlives a book, and a test may copy it, roll it back or wipe it."""

    epoch: int | None = 1
    rebuilding: int | None = None
    accounts: dict[str, Account] = field(default_factory=dict)
    outbox: list[OutboxEntry] = field(default_factory=list)
    entries: int = 0
    last_name: str = ""
    """When the last entry was written (ms), which tells it from another of its number; as text."""
    ledger_stored: int = 0
    fence_ms: int = 0
    cells: dict[str, tuple[int, _Record]] = field(default_factory=dict)
    requests: dict[str, tuple[str, CommandResult]] = field(default_factory=dict)
    request_times: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Request id -> when (ms) it was carried out, and its outbox entry; for those in `requests`."""
    request_marks: dict[str, str] = field(default_factory=dict)
    """Request id -> digest of the body, of old requests."""
    token: int = 0
    step: int = 0
    done_frozen_before_ms: int = 0
    done_appended_before_ms: int = 0


class MemoryBalances:
    """A balance book on a MemoryRedis, as one process sees it. `now_ms` stands in for Redis' clock."""

    def __init__(
        self,
        epoch: int = 1,
        now_ms: Callable[[], int] = lambda: 0,
        redis: MemoryRedis | None = None,
        seen_entry: SeenEntry = NOTHING_SEEN,
    ) -> None:
        self.redis = MemoryRedis(epoch) if redis is None else redis
        self.expected_epoch = epoch
        self.seen_entry = seen_entry
        self._now_ms = now_ms
        self._known_fence_ms = 0
        self._before: dict[str, tuple[int, int]] = {}
        """Balance and floor of the accounts that the call under way has changed."""

    @property
    def known_fence_ms(self) -> int:
        return self._known_fence_ms

    @property
    def outbox(self) -> list[OutboxEntry]:
        """Every entry that was not trimmed."""
        return self.redis.outbox

    def balances(self) -> dict[str, int]:
        """Every account's balance (us)."""
        return {name: account.balance_us for name, account in self.redis.accounts.items()}

    def live_cells(self) -> set[str]:
        """The cells whose records are kept."""
        return set(self.redis.cells)

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        self._check()
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
        self._see()
        return answers

    def _post_cell(self, cell: CellPosting, lines: list[list[object]], cells: list[list[object]]) -> Answer:
        if sum(map(abs, cell.amounts.values())) > MAX_AMOUNT_US:
            return Answer.OVER_LIMIT
        if cell.window_start_ms < self.redis.fence_ms:
            return Answer.FROZEN
        _, known = self.redis.cells.get(cell.cell_id, (0, _Record()))
        if cell.revision < known.revision:
            return Answer.OLDER
        if cell.revision == known.revision:
            return Answer.POSTED if cell.amounts == known.amounts else Answer.OLDER
        gone = sorted(known.amounts.keys() - cell.amounts.keys())
        named = sorted(cell.amounts)
        changes = {
            account: change
            for account in [*named, *gone]
            if (change := cell.amounts.get(account, 0) - known.amounts.get(account, 0))
        }
        start_ms = cell.window_start_ms
        moved = self._move_all(changes, len(cells), lambda name: _REASONS[name[0]], start_ms)
        if moved is None:
            return Answer.OVER_LIMIT
        lines += moved
        if moved:
            cells.append([cell.cell_id, cell.revision, cell.rate_version])
        self.redis.cells[cell.cell_id] = (cell.window_start_ms, _Record(cell.revision, dict(cell.amounts)))
        return Answer.POSTED

    def apply_command(self, command: Command) -> CommandResult:
        self._check()
        digest = command_digest(command)
        known = self.redis.requests.get(command.request_id)
        if known is not None:
            if known[0] != digest:
                return known[1]._replace(outcome=CommandOutcome.CONFLICT)
            if known[1].outcome is CommandOutcome.APPLIED:
                return known[1]._replace(outcome=CommandOutcome.REPLAYED)
            return known[1]
        mark = self.redis.request_marks.get(command.request_id)
        if mark is not None:
            return CommandResult(CommandOutcome.ARCHIVED if mark == digest else CommandOutcome.CONFLICT, 0, 0)
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
        elif command.kind is CommandKind.TOP_UP and command.node_account and other.balance_us < amount_us:
            amount_us, outcome = 0, CommandOutcome.INSUFFICIENT
        elif command.grant and account.grants and len(account.grants.grants) >= MAX_GRANTS:
            amount_us, outcome = 0, CommandOutcome.OVER_LIMIT
        lines: list[list[object]] = []
        if amount_us:
            reason = "adjustment" if command.grant else command.kind.value
            lines = [
                [*self._move(name, amount_us), reason, 0],
                [*self._move(counter, -amount_us), reason, 0],
            ]
            if command.grant:
                self._give(account, Grant(command.request_id, *command.grant, amount_us, amount_us))
                lines[0].append({command.request_id: amount_us})
        result = CommandResult(outcome, amount_us, account.balance_us)
        said = [command.request_id, command.actor, command.reason, digest, command.kind.value, name]
        self._append(
            {
                "command": [*said, str(amount_us), str(account.balance_us), outcome.value],
                "lines": lines,
                "grant": command.grant,
            }
        )
        self.redis.requests[command.request_id] = (digest, result)
        self.redis.request_times[command.request_id] = (self._now_ms(), self.redis.entries)
        self._see()
        return result

    def _give(self, account: Account, grant: Grant) -> None:
        # Made anew: a copy of an older Redis may share what was there before.
        grants = account.grants or Grants()
        account.grants = Grants([*grants.grants, grant])

    def expire_grants(self) -> int:
        self._check()
        due = sorted(
            (grant.expires_ms, f"{name}|{grant.grant_id}", name, grant.grant_id)
            for name, account in self.redis.accounts.items()
            for grant in (account.grants.grants if account.grants else ())
            if grant.expires_ms <= self.redis.fence_ms
        )
        lines: list[list[object]] = []
        expired: list[str] = []
        for *_, name, grant_id in due:
            grants = self.redis.accounts[name].grants
            assert grants is not None
            left_us = grants.remove(grant_id)
            if not grants.grants:
                self.redis.accounts[name].grants = None
            if left_us:
                reference = len(expired)
                lines.append([*self._move(name, -left_us), "adjustment", reference, {grant_id: -left_us}])
                lines.append([*self._move(ADJUSTMENTS, left_us), "adjustment", reference])
                expired.append(grant_id)
        if lines:
            self._append({"expired": expired, "lines": lines})
        self._see()
        return len(due)

    def compact_requests(self, retention_ms: int) -> int:
        self._check()
        redis, before_ms = self.redis, self._now_ms() - retention_ms
        replaced = 0
        for request_id, (at_ms, entry) in list(redis.request_times.items()):
            if at_ms > before_ms or entry > redis.ledger_stored:
                continue
            redis.request_marks[request_id] = redis.requests.pop(request_id)[0]
            del redis.request_times[request_id]
            replaced += 1
        self._see()
        return replaced

    def set_floor(self, account: str, floor_us: int) -> None:
        self._check()
        state = self._account(account)
        if state.floor_us != floor_us:
            self._before[account] = (state.balance_us, state.floor_us)
            state.floor_us = floor_us
            self._append({"floor": [account, str(floor_us)]})
        self._see()

    def raise_fence(self, frozen_before_ms: int) -> int:
        self._check()
        redis = self.redis
        if frozen_before_ms > redis.fence_ms:
            redis.fence_ms = frozen_before_ms
            self._append({"fence": frozen_before_ms})
        for cell_id in [cell_id for cell_id, (start, _) in redis.cells.items() if start < redis.fence_ms]:
            del redis.cells[cell_id]
        self._see()
        return redis.fence_ms

    def begin_resettle(self) -> ResettleTicket:
        self._check()
        redis = self.redis
        redis.token += 1
        redis.step = 0
        self._see()
        return ResettleTicket(
            redis.token,
            redis.fence_ms,
            redis.entries,
            self._now_ms(),
            redis.done_frozen_before_ms,
            redis.done_appended_before_ms,
        )

    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        self._check()
        redis = self.redis
        self._see()
        if token != redis.token:
            return CorrectionAnswer.STALE
        if step == redis.step:
            return CorrectionAnswer.REPEATED
        if step != redis.step + 1:
            raise ValueError(f"STEP expected {redis.step} + 1, found {step}")
        lines: list[list[object]] = []
        cells: list[list[object]] = []
        for correction in corrections:
            if correction.window_start_ms >= redis.fence_ms:
                raise ValueError(f"NOT_FROZEN {correction.cell_id} does not lie before the fence")
            start_ms = correction.window_start_ms
            moved = self._move_all(correction.changes, len(cells), lambda _: "resettle", start_ms)
            if moved is None:
                raise ValueError(f"OVER_LIMIT {correction.cell_id} would take a balance out of its range")
            lines += moved
            cells.append([correction.cell_id, token, correction.rate_version])
        redis.step = step
        self._append({"cells": cells, "lines": lines, "endings": []})
        self._see()
        return CorrectionAnswer.POSTED

    def end_resettle(self, token: int, frozen_before_ms: int, appended_before_ms: int) -> None:
        self._check()
        if token == self.redis.token:
            self.redis.done_frozen_before_ms = frozen_before_ms
            self.redis.done_appended_before_ms = appended_before_ms
        self._see()

    def stored_entry(self) -> int:
        return self.redis.ledger_stored

    def note_stored(self, number: int) -> None:
        """What the script of the outbox's reader does, without the trimming."""
        self._check(seen_entry=SeenEntry(number))
        self.redis.ledger_stored = max(self.redis.ledger_stored, number)

    def _check(self, seen_entry: SeenEntry | None = None) -> None:
        self._before = {}
        redis = self.redis
        epoch = redis.rebuilding if redis.epoch is None else redis.epoch
        if epoch != self.expected_epoch:
            raise WrongRedis(f"EPOCH expected {self.expected_epoch}, found {epoch}")
        seen_entry = self.seen_entry if seen_entry is None else seen_entry
        number, name = seen_entry
        if redis.entries < number:
            redis.epoch = None
            raise WrongRedis(f"EPOCH lost: the outbox has {redis.entries} entries, {number} were seen")
        if self._never_was(number, name):
            redis.epoch = None
            raise WrongRedis(f"EPOCH lost: entry {number} was seen as {name}, which is not in the outbox")

    def _never_was(self, number: int, name: str) -> bool:
        """Whether an entry that somebody saw is not there, and was not trimmed."""
        outbox = self.redis.outbox
        if name in ("", self.redis.last_name) or not outbox:
            return False
        there = any((entry.number, str(entry.at_ms)) == (number, name) for entry in outbox)
        return not there and outbox[0].number <= number

    def _see(self) -> None:
        self.seen_entry = max(self.seen_entry, SeenEntry(self.redis.entries, self.redis.last_name))
        self._known_fence_ms = max(self._known_fence_ms, self.redis.fence_ms)

    def _account(self, name: str) -> Account:
        return self.redis.accounts.setdefault(name, Account())

    def _move_all(
        self,
        changes: Mapping[str, int],
        reference: int,
        reason_of: Callable[[str], str],
        window_start_ms: int,
    ) -> list[list[object]] | None:
        """The lines of these changes and of revenue's; None, with nothing moved, when one is out of range."""
        everything = {**changes, REVENUE: -sum(changes.values())}
        moves = {name: change for name, change in everything.items() if change}
        if any(
            abs(self._account(name).balance_us + change) >= MAX_BALANCE_US for name, change in moves.items()
        ):
            return None
        lines = []
        for name, change in moves.items():
            line: list[object] = [*self._move(name, change), reason_of(name), reference]
            if (grants := self._account(name).grants) and (detail := grants.move(change, window_start_ms)):
                line.append(detail)
            lines.append(line)
        return lines

    def _move(self, name: str, change_us: int) -> list[object]:
        account = self._account(name)
        before_us = account.balance_us
        self._before.setdefault(name, (before_us, account.floor_us))
        account.balance_us += change_us
        account.seq += 1
        return [name, account.seq, str(change_us), str(before_us), str(account.balance_us)]

    def _append(self, fields: dict[str, object]) -> None:
        redis = self.redis
        redis.entries += 1
        entry = {b"epoch": b"%d" % self.expected_epoch, b"at": b"%d" % self._now_ms()}
        entry[b"entry"] = b"%d" % redis.entries
        if alerts := self._alerts():
            fields["alerts"] = alerts
        entry |= {name.encode(): json.dumps(value).encode() for name, value in fields.items()}
        redis.outbox.append(parse_entry(entry))
        redis.last_name = str(self._now_ms())

    def _alerts(self) -> list[list[object]]:
        alerts: list[list[object]] = []
        for name, (before_us, floor_before_us) in sorted(self._before.items()):
            account = self.redis.accounts[name]
            after_us = account.balance_us
            fell = (
                (before_us >= LOW_US > after_us, Threshold.LOW),
                (before_us >= 0 > after_us, Threshold.ZERO),
                (before_us > floor_before_us and after_us <= account.floor_us, Threshold.FLOOR),
            )
            if name.startswith("user/"):
                said = str(after_us), str(account.floor_us)
                alerts += [[name, account.seq, threshold.value, *said] for has, threshold in fell if has]
        return alerts
