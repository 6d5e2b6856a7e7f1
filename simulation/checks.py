"""What has to be true of the books at rest. Each check raises Violation with what it found.

Live settlement is compared before a resettle. Left out of that comparison is what no live rule can know:

- An identity with several bodies of which one lies in a frozen window: its id was forgotten, so the other one may
  count live until a resettle. Left out are the cells of its occurrences; for membership, the room.
- A scope of which something was lost with the head of a log, or with a whole log, together with the recovery store.
- Windows below a fence that Redis lost before the ledger had it: the flow remembers it, and settles nothing there.

And what live settlement is known to leave to a resettle:

- A scope on several partitions that was forgotten while its log was read again: its revisions begin anew, below
  those that were posted before.
- A cell that nothing but a refused occurrence ever was in: posted when that was read first, and not taken back when
  a restart reads the one that counts first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from metering.cells import cell_id, window_start_ms
from metering.commands import CommandOutcome, CommandResult, command_digest
from metering.grants import EXPIRED, Grant
from metering.identity import body_digest
from metering.pricing import cost_us
from metering.settle import Settling
from schemas.commands import Command, CommandKind
from schemas.events import Event, Usage
from schemas.records import LedgerLine
from schemas.rejections import Rejected
from simulation.world import Violation, World

Vector = dict[str, int]
Cells = dict[str, Vector]


def pure_cells(world: World) -> Cells:
    """Every cell as the pure function of all accepted events says, without zeros."""
    settling = Settling(world.card, world.presence_max_ms)
    for _, _, located in sorted(world.occurrences, key=lambda occurrence: occurrence[:2]):
        try:
            settling.add(located.event)
        except Rejected:
            continue
    return {cell_id(scope, start): nonzero(vector) for scope, start, vector, _ in settling.vectors()}


def nonzero(vector: Mapping[str, int]) -> Vector:
    """Without the accounts that nothing was moved of."""
    return {account: amount for account, amount in vector.items() if amount}


def window_of(cell: str) -> int:
    """The start of the cell's window (ms)."""
    return int(cell.rpartition("@")[2])


def posted_cells(lines: Iterable[LedgerLine]) -> Cells:
    """Every cell as the ledger's lines add up, without zeros."""
    cells: defaultdict[str, Vector] = defaultdict(dict)
    for line in lines:
        if line.cell_id:
            cell = cells[line.cell_id]
            cell[line.account] = cell.get(line.account, 0) + line.change_us
    return {cell: nonzero(vector) for cell, vector in cells.items()}


def check_ledger(world: World) -> Cells:
    """Entries without gaps, chains without breaks, sums of zero, balances as the last lines; returns the cells."""
    lines = world.journal.counted_lines()
    entries = world.journal.entries()
    missing = [number for number in range(1, world.redis.entries + 1) if number not in entries]
    if missing or max(entries, default=0) > world.redis.entries:
        raise Violation(f"of {world.redis.entries} outbox entries the ledger lacks {missing}")
    last: dict[str, tuple[int, int]] = {}
    sums: Counter[tuple[int, str]] = Counter()
    fences = {
        move.entry: move.frozen_before_ms
        for move in world.journal.stored_fence_moves()
        if world.journal.counts(move.epoch, move.entry)
    }
    fence_ms, fenced_to = 0, 0
    for line in sorted(lines, key=lambda line: (line.entry, line.seq)):
        for number in range(fenced_to + 1, line.entry + 1):
            fence_ms = max(fence_ms, fences.get(number, 0))
        fenced_to = max(fenced_to, line.entry)
        sums[line.entry, line.cell_id or line.request_id] += line.change_us
        seq, balance_us = last.get(line.account, (0, 0))
        if line.seq != seq + 1 or line.balance_before_us != balance_us:
            raise Violation(f"{line.account}: line {line.seq} in entry {line.entry} follows {seq} badly")
        if line.balance_after_us != balance_us + line.change_us:
            raise Violation(f"{line.account}: line {line.seq} does not add up")
        last[line.account] = (line.seq, line.balance_after_us)
        if line.cell_id and line.reason != "resettle" and window_of(line.cell_id) < fence_ms:
            raise Violation(f"entry {line.entry} moves {line.cell_id} live, which was frozen by then")
    for (entry, what), total in sums.items():
        if total:
            raise Violation(f"entry {entry}: {what} sums to {total}")
    for name, account in world.redis.accounts.items():
        if (account.seq, account.balance_us) != last.pop(name, (0, 0)):
            raise Violation(f"{name}: Redis has another balance than the ledger")
    if last:
        raise Violation(f"Redis lacks {sorted(last)}")
    return posted_cells(lines)


def check_commands(world: World) -> None:
    """Every valid command was carried out once, as the first of its request id says."""
    moved: defaultdict[str, Vector] = defaultdict(dict)
    for line in world.journal.counted_lines():
        if line.request_id and not line.request_id.startswith(EXPIRED):
            amounts = moved[line.request_id]
            amounts[line.account] = amounts.get(line.account, 0) + line.change_us
            if len(amounts) > 2:
                raise Violation(f"{line.request_id} moved {amounts}")
    first: dict[str, Command] = {}
    for command in world.valid_commands():
        first.setdefault(command.request_id, command)
    records = {record.request_id: record for record in world.journal.counted_requests()}
    if extra := moved.keys() - first.keys():
        raise Violation(f"nobody asked for {sorted(extra)}")
    for request_id, command in first.items():
        record = records.get(request_id)
        if record is None:
            raise Violation(f"{request_id} was not carried out")
        stored = CommandResult(CommandOutcome(record.outcome), record.amount_us, record.balance_us)
        mark = world.redis.request_marks.get(request_id)
        known = world.redis.requests.get(request_id) or (mark and (mark, stored))
        if not known:
            raise Violation(f"Redis does not know {request_id}")
        digest, result = known
        if digest != command_digest(command) or record.digest != digest:
            raise Violation(f"{request_id} was carried out with another body")
        if (record.amount_us, record.outcome) != (result.amount_us, result.outcome):
            raise Violation(f"{request_id}: ledger and Redis know another result")
        wanted = command.amount_us if result.outcome is CommandOutcome.APPLIED else 0
        if command.kind is not CommandKind.WRITE_OFF and result.amount_us != wanted:
            raise Violation(f"{request_id} moved {result.amount_us} of {wanted}")
        if moved[request_id].get(command.account, 0) != result.amount_us:
            raise Violation(f"{request_id}: lines move {moved[request_id]}, the result is {result.amount_us}")


def check_grants(world: World) -> None:
    """What Redis says is left of each grant is what the ledger's lines say of it."""
    expected = world.archive.grants_left()
    for name, account in world.redis.accounts.items():
        found = account.grants.grants if account.grants else []
        # One of which nothing was left expires without a line.
        stored = [grant for grant in expected.get(name, []) if grant.left_us or grant in found]
        if sorted(found, key=_grant_order) != sorted(stored, key=_grant_order):
            raise Violation(f"{name}: Redis has grants {found}, the ledger {expected.get(name)}")
        gone = [line.request_id for line in world.journal.counted_lines() if line.account == name]
        if len(set(filter(_is_expiry, gone))) < len(list(filter(_is_expiry, gone))):
            raise Violation(f"{name}: a grant expired twice")
        for grant in found:
            if not 0 <= grant.left_us <= grant.amount_us:
                raise Violation(f"{name}: of {grant} something is left that never was")


def check_write_offs(world: World) -> None:
    """Every transfer that was planned is closed, with what the ledger moved: as much as was planned at most."""
    moved = {request.request_id: request for request in world.journal.counted_requests()}
    book = world.write_offs
    if book.open_transfers():
        raise Violation(f"{book.open_transfers()} is open")
    for transfer, result in book.closed.items():
        request = moved[transfer.request_id]
        if (result.amount_us, result.balance_us) != (request.amount_us, request.balance_us):
            raise Violation(f"{transfer} was closed with {result}, the ledger has {request}")
        if not 0 <= result.amount_us <= transfer.amount_us:
            raise Violation(f"{transfer} moved {result.amount_us}")


def _is_expiry(request_id: str) -> bool:
    return request_id.startswith(EXPIRED)


def _grant_order(grant: Grant) -> tuple[int, int, str]:
    return grant.order


def _bodies(world: World) -> dict[tuple[str, str, str], list[Event]]:
    found: dict[tuple[str, str, str], dict[bytes, Event]] = {}
    for _, _, located in world.occurrences:
        event = located.event
        found.setdefault((event.scope, event.source, event.id), {})[body_digest(event)] = event
    return {identity: list(bodies.values()) for identity, bodies in found.items()}


def _on_several_partitions(world: World) -> set[str]:
    partition_of: dict[str, int] = {}
    return {
        located.event.scope
        for partition, _, located in world.occurrences
        if partition_of.setdefault(located.event.scope, partition) != partition
    }


def check_live(world: World, posted: Cells, pure: Cells, coverage: Counter[str]) -> None:
    """Every live cell is exact; no frozen one has moved more than its usage could."""
    fence_ms = world.redis.fence_ms
    bodies = _bodies(world)
    excused_cells: set[str] = set()
    excused_scopes = world.forgetful | (world.forgotten & _on_several_partitions(world))
    most: Counter[str] = Counter()
    for several in bodies.values():
        costs: dict[str, int] = {}
        frozen = False
        for event in several:
            start = window_start_ms(event.time_ms)
            frozen = frozen or start < world.highest_fence_ms
            if isinstance(event, Usage):
                rates = world.card.version_at(event.time_ms)
                assert rates is not None
                cell = cell_id(event.scope, start)
                costs[cell] = max(costs.get(cell, 0), cost_us(event, rates))
        most.update(costs)
        if len(several) > 1:
            excused_cells.update(cell for cell in costs if cell not in pure)
        if len(several) > 1 and frozen:
            excused_cells.update(costs)
            excused_scopes.update(event.scope for event in several if not isinstance(event, Usage))
    for cell in sorted(pure.keys() | posted.keys()):
        vector = posted.get(cell, {})
        if window_of(cell) < fence_ms:
            charged = -sum(amount for account, amount in vector.items() if account.startswith("user/"))
            if not 0 <= charged <= most[cell]:
                raise Violation(f"frozen cell {cell} charged {charged} of at most {most[cell]}")
            coverage["frozen cells bounded"] += 1
        elif (
            window_of(cell) < world.highest_fence_ms
            or cell in excused_cells
            or cell.rpartition("@")[0] in excused_scopes
        ):
            coverage["live cells excused"] += 1
        elif vector != pure.get(cell, {}):
            raise Violation(f"live cell {cell} moved {vector}, should have {pure.get(cell)}")
        else:
            coverage["live cells exact"] += 1


def check_frozen_since(
    world: World, before: Cells, quiet: Iterable[str], posted: Cells, coverage: Counter[str]
) -> None:
    """What was live at the last rest, and froze with nothing new to its scope, has not moved since, but by a
    resettle, of what no live rule can know."""
    scopes = set(quiet)
    resettled = {line.cell_id for line in world.journal.counted_lines() if line.reason == "resettle"}
    for cell, vector in before.items():
        if (
            cell not in resettled
            and cell.rpartition("@")[0] in scopes
            and window_of(cell) < world.redis.fence_ms
        ):
            if posted.get(cell, {}) != vector:
                raise Violation(f"{cell} moved from {vector} to {posted.get(cell)} with no event to it")
            coverage["frozen cells unmoved"] += 1


def check_exact(world: World, posted: Cells, pure: Cells, coverage: Counter[str]) -> None:
    """After a complete resettle every frozen cell is what the pure function says."""
    for cell in sorted(pure.keys() | posted.keys()):
        if window_of(cell) < world.redis.fence_ms:
            if posted.get(cell, {}) != pure.get(cell, {}):
                raise Violation(f"frozen cell {cell} has {posted.get(cell)}, should have {pure.get(cell)}")
            coverage["frozen cells exact"] += 1


def check_balances(world: World, pure: Cells) -> None:
    """With everything frozen and resettled: balances are the sums of all cells and of all commands."""
    totals: Counter[str] = Counter()
    for vector in pure.values():
        totals.update(vector)
    for line in world.journal.counted_lines():
        if line.request_id:
            totals[line.account] += line.change_us
    balances = nonzero({name: account.balance_us for name, account in world.redis.accounts.items()})
    if balances != nonzero(totals):
        raise Violation(f"balances {balances}, should be {nonzero(totals)}")
    if sum(balances.values()):
        raise Violation(f"balances sum to {sum(balances.values())}")
