"""The outbox: what one entry of the Redis stream `ledger` says, as records for ClickHouse.

An entry is what one script call changed, all or nothing. Its fields: epoch, at (ms), and either lines with
cells and endings, or lines with a command, or a fence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from metering.cells import scope_ids
from schemas.records import FenceMove, LedgerLine, LedgerReason, SettlementReason, SettlementRecord

_json = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """The records of one entry."""

    lines: list[LedgerLine] = field(default_factory=list)
    settlements: list[SettlementRecord] = field(default_factory=list)
    fence_moves: list[FenceMove] = field(default_factory=list)


def parse_entry(fields: Mapping[bytes, bytes]) -> OutboxEntry:
    """The records of an entry, as redis-py hands it over. Raises KeyError or ValueError for a foreign one."""
    epoch, at_ms = int(fields[b"epoch"]), int(fields[b"at"])
    if b"fence" in fields:
        move = FenceMove(frozen_before_ms=int(fields[b"fence"]), epoch=epoch, moved_at_ms=at_ms)
        return OutboxEntry(fence_moves=[move])
    lines = _json.decode(fields[b"lines"])
    if b"command" in fields:
        request_id, actor, note = _json.decode(fields[b"command"])
        about: dict[str, Any] = {"request_id": request_id, "actor": actor, "note": note}
        return OutboxEntry(lines=[_line(parts, epoch, at_ms, about) for parts in lines])
    cells = [_about_cell(*parts) for parts in _json.decode(fields[b"cells"])]
    return OutboxEntry(
        lines=[_line(parts, epoch, at_ms, cells[parts[6]]) for parts in lines],
        settlements=[_settlement(parts, epoch, at_ms) for parts in _json.decode(fields[b"endings"])],
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


def _line(parts: list[Any], epoch: int, at_ms: int, about: Mapping[str, Any]) -> LedgerLine:
    account, seq, change_us, before_us, after_us, reason = parts[:6]
    # The script is the one writer and checked every part; validating again would cost more than inserting.
    return LedgerLine.model_construct(
        account=account,
        seq=seq,
        change_us=int(change_us),
        balance_before_us=int(before_us),
        balance_after_us=int(after_us),
        reason=LedgerReason(reason),
        epoch=epoch,
        posted_at_ms=at_ms,
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


def _settlement(parts: list[Any], epoch: int, at_ms: int) -> SettlementRecord:
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
        epoch=epoch,
        posted_at_ms=at_ms,
    )
