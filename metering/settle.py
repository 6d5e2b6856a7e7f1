"""The bill as a pure function of a set of events: what `metering settle` prints and every proof compares with.

It knows no broker and no lateness: all events count. Of several occurrences of an identity the first counts,
as the one with the smallest (partition, offset) does elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from metering.cells import WINDOW_MS, cell_id, cell_vector, window_start_ms
from metering.identity import body_digest, identity_digest
from metering.presence import PRESENCE_MAX_MS, Presence
from metering.pricing import cost_us, credit_us
from schemas.decode import decode_event
from schemas.events import Event, Usage
from schemas.rate_card import RateCard
from schemas.rejections import Rejected, RejectReason


@dataclass(frozen=True, slots=True)
class SettledLine:
    """What one account gets from one cell: charges negative, credits positive."""

    account: str
    cell_id: str
    amount_us: int
    events: int
    """Usage events in the cell."""


@dataclass(frozen=True, slots=True)
class LineReject:
    """A line that is no accepted event; lines are counted from 1."""

    line: int
    reason: RejectReason
    detail: str


@dataclass(slots=True)
class _Cell:
    cost_us_by_user: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    credit_us_by_node: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    events: int = 0


class Settling:
    """Adds events in the order of their positions and then says what everyone owes and earns."""

    def __init__(self, card: RateCard, presence_max_ms: int = PRESENCE_MAX_MS) -> None:
        self._card = card
        self._presence_max_ms = presence_max_ms
        self._bodies: dict[tuple[str, bytes], bytes] = {}
        self._cells: dict[tuple[str, int], _Cell] = {}
        self._rooms: dict[str, Presence] = {}

    def add(self, event: Event) -> bool:
        """Count the event; False when it repeats one that counts. Raises Rejected: no_rate, identity_conflict."""
        rates = None
        if isinstance(event, Usage):
            rates = self._card.version_at(event.time_ms)
            if rates is None:
                raise Rejected(RejectReason.NO_RATE, "usage before the first version of the rate card")
        identity = (event.scope, identity_digest(event.source, event.id))
        body = body_digest(event)
        counted = self._bodies.setdefault(identity, body)
        if counted is not body:
            if counted == body:
                return False
            raise Rejected(RejectReason.IDENTITY_CONFLICT, f"id {event.id!r} is taken by a different event")
        if not isinstance(event, Usage):
            room = self._rooms.setdefault(event.scope, Presence(self._presence_max_ms))
            room.add(event.kind, event.user_id, event.time_ms)
            return True
        assert rates is not None
        cell = self._cells.setdefault((event.scope, window_start_ms(event.time_ms)), _Cell())
        cell.cost_us_by_user[event.user_id] += cost_us(event, rates)
        cell.credit_us_by_node[event.node_id] += credit_us(event, rates)
        cell.events += 1
        return True

    def vectors(self) -> Iterator[tuple[str, int, dict[str, int], int]]:
        """(scope, window start, vector, usage events) of every cell, in no particular order."""
        for (scope, start), cell in self._cells.items():
            room = self._rooms.get(scope)
            members = room.members(start, start + WINDOW_MS) if room else frozenset()
            vector = cell_vector(scope, start, cell.cost_us_by_user, cell.credit_us_by_node, members)
            yield scope, start, vector, cell.events

    def lines(self) -> list[SettledLine]:
        """One line for every payer, node and platform/revenue of every cell, sorted by account, then cell."""
        lines = [
            SettledLine(account, cell_id(scope, start), amount_us, events)
            for scope, start, vector, events in self.vectors()
            for account, amount_us in vector.items()
        ]
        lines.sort(key=lambda line: (line.account, line.cell_id))
        return lines


def settle_lines(
    lines: Iterable[bytes], card: RateCard, presence_max_ms: int = PRESENCE_MAX_MS
) -> tuple[list[SettledLine], list[LineReject]]:
    """Settle CloudEvents, one per line; blank lines are skipped but counted."""
    settling = Settling(card, presence_max_ms)
    rejects: list[LineReject] = []
    for number, line in enumerate(lines, start=1):
        stripped = line.rstrip(b"\r\n")
        if not stripped.strip():
            continue
        try:
            settling.add(decode_event(stripped))
        except Rejected as rejected:
            rejects.append(LineReject(number, rejected.reason, rejected.detail))
    return settling.lines(), rejects
