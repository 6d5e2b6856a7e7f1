"""Events and messages for tests, short to write."""

from __future__ import annotations

from metering.live import Located
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.messages import RawMessage

WINDOW_MS = 60_000
START_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z, the start of a window."""


def usage(
    event_id: str,
    time_ms: int = START_MS,
    *,
    room: str | None = "r-1",
    session: str = "s-1",
    user: str = "u-1",
    node: str = "n-1",
    asr: int = 100,
    nmt: int = 50,
    tts: int = 70,
    gpu: int = 200,
    source: str = "node/n-1",
) -> Usage:
    """A usage event; its scope follows from room and session."""
    scope = f"session/{session}" if room is None else f"room/{room}"
    return Usage(
        scope, source, event_id, time_ms, session, room, user, node, f"ut-{event_id}", 1_000,
        asr, nmt, tts, gpu, "zh", "en",
    )  # fmt: skip


def membership(
    event_id: str,
    kind: LifecycleKind,
    time_ms: int = START_MS,
    *,
    room: str = "r-1",
    user: str | None = "u-1",
) -> Lifecycle:
    """A room event."""
    user = None if kind is LifecycleKind.CLOSED else user
    return Lifecycle(f"room/{room}", "scheduler/1", event_id, time_ms, kind, user, None, room)


def session_event(
    event_id: str, kind: LifecycleKind, time_ms: int = START_MS, session: str = "s-1"
) -> Lifecycle:
    """A session event outside any room."""
    return Lifecycle(f"session/{session}", "scheduler/1", event_id, time_ms, kind, "u-1", session, None)


def at(event: Event, offset: int, partition: int = 0, appended_at_ms: int | None = None) -> Located:
    """The event at a place in the log."""
    appended = event.time_ms if appended_at_ms is None else appended_at_ms
    return Located(event, RawMessage("lingua.events", partition, offset, None, b"{}", appended))
