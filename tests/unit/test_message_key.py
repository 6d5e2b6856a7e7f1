"""The Kafka key of what is sent: the scope, or for broken messages the best guess."""

from __future__ import annotations

import pytest

from app.emit import message_key

CLOSED = (
    b'{"specversion":"1.0","id":"c","source":"s","type":"lingua.room.closed.v1",'
    b'"time":"2026-01-01T00:00:00Z","data":{"room_id":"r-1"}}'
)


def test_a_valid_event_has_its_scope() -> None:
    """The scope, as bytes."""
    assert message_key(CLOSED) == b"room/r-1"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"data":{"room_id":"r-1","session_id":"s-1"}}', b"room/r-1"),
        (b'{"data":{"session_id":"s-1"}}', b"session/s-1"),
        (b'{"data":{"room_id":7,"session_id":"s-1"}}', b"session/s-1"),
        (b'{"data":{"room_id":""}}', None),
        (b'{"data":[]}', None),
        (b'["data"]', None),
        (b"not json", None),
        (b'{"data":{"room_id":"\xff"}}', None),
        (b'{"data":{"room_id":"\\ud800"}}', None),
        (b"[" * 100_000, None),
        (b"", None),
    ],
)
def test_a_broken_message_has_the_key_that_its_ids_suggest(line: bytes, key: bytes | None) -> None:
    """It stays near its scope's other messages if that can be told, and never stops the sending."""
    assert message_key(line) == key
