"""What a node says, as bytes: CloudEvents 1.0 in structured JSON, one line each.

The law: whatever `encode` gets past the `checked_*` functions, the decoder of the metering project accepts.
Fields are therefore checked where they come in, by name, and not when it is too late to do anything about it.

An event's id is a ULID. Ids of one process grow: also within a millisecond, and also while the clock goes
back. An event's `time` is the wall clock itself and may go back with it: a time that only grows would stay in
the future after a clock was ahead for a moment, and usage from the future is refused.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring

USAGE = "lingua.usage.utterance.v1"
SESSION_STARTED = "lingua.session.started.v1"
SESSION_ENDED = "lingua.session.ended.v1"
ROOM_JOINED = "lingua.room.joined.v1"
ROOM_LEFT = "lingua.room.left.v1"
ROOM_CLOSED = "lingua.room.closed.v1"

MAX_DURATION_MS = 3_600_000
"""One hour: the longest duration that is accepted."""

MAX_TEXT_CHARACTERS = 256

_LAST_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_RANDOM_BITS = 80
_RANDOM_BYTES = 10
_RANDOM_BYTES_AT_ONCE = 4_000
_NS_PER_MS = 1_000_000

_BASE_32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _BASE_32 for low in _BASE_32]
"""Crockford's digits, two at a time: a ULID is 13 of these."""


def checked_id(name: str, value: object) -> str:
    """The id, if it is one. Raises TypeError or ValueError with the field's name."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: must be a text, not {type(value).__name__}")
    if _ID.fullmatch(value) is None:
        raise ValueError(f"{name}: {value[:60]!r} is not 1 to 128 of A-Z a-z 0-9 . _ : -")
    return value


def checked_text(name: str, value: object) -> str:
    """The text, if it can be sent. Raises TypeError or ValueError with the field's name."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: must be a text, not {type(value).__name__}")
    if not 1 <= len(value) <= MAX_TEXT_CHARACTERS:
        raise ValueError(f"{name}: must have 1 to {MAX_TEXT_CHARACTERS} characters, not {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {value[:60]!r} is no Unicode text") from None
    return value


def checked_ms(name: str, value: object) -> float:
    """A measured duration in ms, whole or not. Raises TypeError or ValueError with the field's name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: must be a number of milliseconds, not {type(value).__name__}")
    # Not a number is not at least zero either.
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: must be zero or more, and finite, not {value}")
    return value


def whole_ms(duration_ns: int) -> int:
    """Nanoseconds as milliseconds, half up, at most MAX_DURATION_MS."""
    return min((duration_ns + _NS_PER_MS // 2) // _NS_PER_MS, MAX_DURATION_MS)


def scope_of(session_id: str | None, room_id: str | None) -> str:
    """What the event is about, and its Kafka key: the room if there is one, else the session."""
    return f"session/{session_id}" if room_id is None else f"room/{room_id}"


def rfc3339(time_ms: int) -> str:
    """Milliseconds since the Unix epoch as `YYYY-MM-DDTHH:MM:SS.mmmZ`. Clamped to the years 1970 to 9999."""
    second, ms = divmod(min(max(time_ms, 0), _LAST_MS), 1000)
    return f"{_second(second)}.{ms:03}Z"


@lru_cache(maxsize=4)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def encode(
    kind: str, event_id: str, source: str, scope: str, time_ms: int, data: Mapping[str, str | int | None]
) -> bytes:
    """The event as one line of JSON without its line break. Fields of `data` that are None are left out.

    Written out by hand, which takes a quarter of what the encoder takes: only the texts in `data` can have
    characters that need an escape, everything else is checked, a number, or ours.
    """
    fields = ",".join(
        [
            f'"{name}":{value}' if isinstance(value, int) else f'"{name}":{encode_basestring(value)}'
            for name, value in data.items()
            if value is not None
        ]
    )
    return (
        f'{{"specversion":"1.0","id":"{event_id}","source":"{source}","type":"{kind}","subject":"{scope}",'
        f'"time":"{rfc3339(time_ms)}","data":{{{fields}}}}}'
    ).encode()


class EventIds:
    """ULIDs that only grow. Not safe for several threads at once: the caller has a lock already."""

    def __init__(self) -> None:
        self._last = 0
        self._random = memoryview(b"")

    def next(self, now_ms: int) -> str:
        """An id greater than all before it, with the time `now_ms`, or a later one that was used already."""
        if not self._random:
            self._random = memoryview(os.urandom(_RANDOM_BYTES_AT_ONCE))
        random, self._random = self._random[:_RANDOM_BYTES], self._random[_RANDOM_BYTES:]
        number = min(max(now_ms, 0), _LAST_MS) << _RANDOM_BITS | int.from_bytes(random, "big")
        # Of the same millisecond, or of a clock that went back: count on from the last one.
        if number >> _RANDOM_BITS <= self._last >> _RANDOM_BITS:
            number = self._last + 1
        self._last = number
        return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])
