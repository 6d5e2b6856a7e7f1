"""The outbox: what one entry of the Redis stream `ledger` says, as records for ClickHouse.

An entry is what one script call changed, all or nothing. Its fields: epoch, entry (its number), at (ms), and
either lines with cells and endings, or lines with a command, or lines with expired grants, or a fence, or a floor;
and alerts, if the balances fell past a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from metering.cells import scope_ids
from metering.commands import CommandOutcome
from metering.grants import EXPIRED
from schemas.records import (
    Alert,
    FenceMove,
    FloorRecord,
    GrantRecord,
    LedgerLine,
    LedgerReason,
    RequestRecord,
    SettlementReason,
    SettlementRecord,
    Threshold,
)

_json = msgspec.json.Decoder()


class Continuity:
    """Whether a reader of the outbox sees the stream that was stored so far, entry after entry.

    `stored_number` and `stored_at_ms` are of the last entry that the ledger has; zeros when it has none.
    """

    def __init__(self, stored_number: int, stored_at_ms: int) -> None:
        self._stored_number = stored_number
        self._stored_at_ms = stored_at_ms
        self._last: int | None = None

    def check(self, number: int, at_ms: int) -> str | None:
        """Take the next entry; says what is wrong when this is another history than the ledger's: Redis came back
        without its end, and gives numbers again."""
        last, self._last = self._last, number
        if last is not None and number <= last:
            return f"entry {number} of the outbox comes after {last}"
        return self._differs(number, at_ms)

    def _differs(self, number: int, at_ms: int) -> str | None:
        stored_at_ms = self._stored_at_ms
        if number == self._stored_number and at_ms != stored_at_ms:
            return (
                f"entry {number} of the outbox was written at {at_ms} ms, the ledger's at {stored_at_ms} ms"
            )
        return None

    def looks_ahead(self, number: int) -> int:
        """The number of the entry that has to be seen, and to be the stored one, before entries up to `number` may
        be stored again; 0 for none. They are repeats if this is the history that was stored, and would replace it
        if it is another."""
        return self._stored_number if number < self._stored_number else 0

    def check_ahead(self, found: tuple[int, int] | None) -> str | None:
        """Says what is wrong with what was found there: number and time of the first entry with that number or a
        higher one, None for none. Takes nothing."""
        if found is None or found[0] != self._stored_number:
            return f"the outbox has not got entry {self._stored_number} any more, which the ledger has"
        return self._differs(*found)

    def missing(self, number: int) -> int:
        """How many entries before this one were never stored and are not in the outbox any more; asked before
        `check`."""
        expected = (self._stored_number if self._last is None else self._last) + 1
        return max(number - expected, 0)


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """The records of one entry. Entries are numbered without gaps, across epochs."""

    number: int
    epoch: int
    at_ms: int
    lines: list[LedgerLine] = field(default_factory=list)
    settlements: list[SettlementRecord] = field(default_factory=list)
    fence_moves: list[FenceMove] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    floors: list[FloorRecord] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    grants: list[GrantRecord] = field(default_factory=list)


def parse_entry(fields: Mapping[bytes, bytes]) -> OutboxEntry:
    """The records of an entry, as redis-py hands it over. Raises KeyError or ValueError for a foreign one."""
    number, epoch, at_ms = int(fields[b"entry"]), int(fields[b"epoch"]), int(fields[b"at"])
    entry = OutboxEntry(number, epoch, at_ms)
    if b"alerts" in fields:
        entry.alerts.extend(_alert(parts, entry) for parts in _json.decode(fields[b"alerts"]))
    if b"fence" in fields:
        move = FenceMove(frozen_before_ms=int(fields[b"fence"]), epoch=epoch, moved_at_ms=at_ms, entry=number)
        entry.fence_moves.append(move)
        return entry
    if b"floor" in fields:
        account, floor_us = _json.decode(fields[b"floor"])
        floor = FloorRecord(
            account=account, floor_us=int(floor_us), epoch=epoch, entry=number, set_at_ms=at_ms
        )
        entry.floors.append(floor)
        return entry
    lines = _json.decode(fields[b"lines"])
    if b"command" in fields:
        request = _request(_json.decode(fields[b"command"]), entry)
        entry.requests.append(request)
        about: dict[str, Any] = {
            "request_id": request.request_id,
            "actor": request.actor,
            "note": request.note,
        }
        entry.lines.extend(_line(parts, entry, about) for parts in lines)
        terms = _json.decode(fields.get(b"grant", b"null"))
        if terms is not None and request.outcome == CommandOutcome.APPLIED:
            entry.grants.append(_grant(request, *terms))
        return entry
    if b"expired" in fields:
        expired: list[dict[str, Any]] = [
            {"request_id": EXPIRED + grant_id, "note": "grant expired"}
            for grant_id in _json.decode(fields[b"expired"])
        ]
        entry.lines.extend(_line(parts, entry, expired[parts[6]]) for parts in lines)
        return entry
    cells = [_about_cell(*parts) for parts in _json.decode(fields[b"cells"])]
    entry.lines.extend(_line(parts, entry, cells[parts[6]]) for parts in lines)
    entry.settlements.extend(_settlement(parts, entry) for parts in _json.decode(fields[b"endings"]))
    return entry


def _alert(parts: list[Any], entry: OutboxEntry) -> Alert:
    account, seq, threshold, balance_us, floor_us = parts
    return Alert(
        account=account,
        threshold=Threshold(threshold),
        balance_us=int(balance_us),
        floor_us=int(floor_us),
        seq=seq,
        epoch=entry.epoch,
        entry=entry.number,
        at_ms=entry.at_ms,
    )


def _request(parts: list[Any], entry: OutboxEntry) -> RequestRecord:
    request_id, actor, note, digest, kind, account, amount_us, balance_us, outcome = parts
    return RequestRecord(
        request_id=request_id,
        digest=digest,
        kind=kind,
        account=account,
        amount_us=int(amount_us),
        balance_us=int(balance_us),
        outcome=outcome,
        actor=actor,
        note=note,
        epoch=entry.epoch,
        entry=entry.number,
        posted_at_ms=entry.at_ms,
    )


def _grant(request: RequestRecord, priority: int, from_ms: int, expires_ms: int) -> GrantRecord:
    return GrantRecord(
        grant_id=request.request_id,
        account=request.account,
        priority=priority,
        from_ms=from_ms,
        expires_ms=expires_ms,
        amount_us=request.amount_us,
        note=request.note,
        epoch=request.epoch,
        entry=request.entry,
        granted_at_ms=request.posted_at_ms,
    )


def _about_cell(cell_id: str, revision: int, rate_version: str) -> dict[str, Any]:
    scope = cell_id.rpartition("@")[0]
    session_id, room_id = scope_ids(scope)
    return {
        "cell_id": cell_id,
        "revision": revision,
        "rate_version": rate_version,
        "scope": scope,
        "session_id": session_id,
        "room_id": room_id,
    }


def _line(parts: list[Any], entry: OutboxEntry, about: Mapping[str, Any]) -> LedgerLine:
    account, seq, change_us, before_us, after_us, reason = parts[:6]
    # The script is the one writer and checked every part; validating again would cost more than inserting.
    return LedgerLine.model_construct(
        account=account,
        seq=seq,
        change_us=int(change_us),
        balance_before_us=int(before_us),
        balance_after_us=int(after_us),
        reason=LedgerReason(reason),
        epoch=entry.epoch,
        posted_at_ms=entry.at_ms,
        entry=entry.number,
        grants=parts[7] if len(parts) > 7 else {},
        **{**_NOTHING, **about},
    )


_NOTHING: dict[str, Any] = {
    "request_id": "",
    "cell_id": "",
    "revision": 0,
    "scope": "",
    "session_id": "",
    "room_id": "",
    "rate_version": "",
    "actor": "",
    "note": "",
}


def _settlement(parts: list[Any], entry: OutboxEntry) -> SettlementRecord:
    scope, reason, first_event_ms, last_event_ms, revision = parts
    session_id, room_id = scope_ids(scope)
    return SettlementRecord(
        scope=scope,
        session_id=session_id,
        room_id=room_id,
        reason=SettlementReason(reason),
        first_event_ms=first_event_ms,
        last_event_ms=last_event_ms,
        revision=revision,
        epoch=entry.epoch,
        posted_at_ms=entry.at_ms,
        entry=entry.number,
    )
