"""What an accepted event is once it is inside: flat, frozen, and valid by construction.

The wire form (CloudEvents, JSON) is defined in `schemas.cloudevents`; `schemas.decode` turns bytes into
these. Nothing downstream sees a dict. Times are integer milliseconds since the Unix epoch, durations integer
milliseconds, and `scope` is `room/<room_id>` when the event has a room, else `session/<session_id>`.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Usage(msgspec.Struct, frozen=True, gc=False):
    """One utterance's processing times, as reported by a compute node."""

    scope: str
    source: str
    id: str
    time_ms: int
    session_id: str
    room_id: str | None
    user_id: str
    node_id: str
    utterance_id: str
    audio_ms: int | None
    asr_time_ms: int
    nmt_time_ms: int
    tts_time_ms: int
    gpu_active_time_ms: int
    source_lang: str | None
    target_lang: str | None


class LifecycleKind(IntEnum):
    """Lifecycle events; the values are the order in which equal times apply (joined, left, closed)."""

    JOINED = 1
    LEFT = 2
    CLOSED = 3
    SESSION_STARTED = 4
    SESSION_ENDED = 5


class Lifecycle(msgspec.Struct, frozen=True, gc=False):
    """A session or room beginning, ending, or changing its members.

    `user_id` is None only for CLOSED; `session_id` is set only for the session kinds; `room_id` is set for
    the room kinds and for a session that runs in a room.
    """

    scope: str
    source: str
    id: str
    time_ms: int
    kind: LifecycleKind
    user_id: str | None
    session_id: str | None
    room_id: str | None


Event = Usage | Lifecycle
