"""Records go to disk by range of scopes and come back whole, in their order."""

from __future__ import annotations

import struct

from app.repair.spool import BUFFER_BYTES, ScopeSpool
from sources.archive import ScopeRange

RANGES = [ScopeRange(None, "room/m"), ScopeRange("room/m", "session/c"), ScopeRange("session/c", None)]


def test_a_range_has_its_scopes_up_to_and_with_its_last() -> None:
    """The bound belongs to the range that it ends."""
    with ScopeSpool(RANGES) as spool:
        for scope in (b"room/a", b"room/m", b"room/m0", b"session/c", b"session/d"):
            spool.add(scope, scope + b"\n")
        found = [b"".join(spool.pieces(number)).split() for number in range(3)]
    assert found == [[b"room/a", b"room/m"], [b"room/m0", b"session/c"], [b"session/d"]]


def test_records_beyond_the_buffer_come_back_whole_and_in_order() -> None:
    """Pieces never cut a record, also of ranges that were written in turns."""
    record = struct.Struct("<IQ")
    count = 3 * BUFFER_BYTES // record.size
    with ScopeSpool(RANGES) as spool:
        for number in range(count):
            spool.add(b"room/a" if number % 3 else b"session/z", record.pack(7, number))
        assert list(spool.pieces(1)) == []
        found = {
            number: [value for piece in spool.pieces(number) for _, value in record.iter_unpack(piece)]
            for number in (0, 2)
        }
    assert found[0] == [number for number in range(count) if number % 3]
    assert found[2] == [number for number in range(count) if not number % 3]
