"""What a workload shall be: its size, its span, and what the network does to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.errors import CommandError
from schemas.rfc3339 import LAST_MS


class WorkloadError(CommandError):
    """The workload that was asked for cannot be made; the message is one clear line."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def check_span(first_ms: int, last_ms: int) -> None:
    """Raises WorkloadError for event times that ids and RFC 3339 cannot express."""
    if first_ms < 0 or last_ms > LAST_MS:
        raise WorkloadError("event times lie between 1970 and the end of 9999")


@dataclass(frozen=True)
class TransportEffects:
    """What happens to messages on their way; each a fraction of the events, met to the message.

    `duplicates`: sent again with the same bytes, half of them at once and half of them later. `disorder`:
    overtaken by up to 50 messages. `late`: held back until everything else is sent. `junk`: additional
    messages that must be refused.
    """

    duplicates: float = 0.0
    disorder: float = 0.0
    late: float = 0.0
    junk: float = 0.0

    def __post_init__(self) -> None:
        for name in ("duplicates", "disorder", "late", "junk"):
            fraction = getattr(self, name)
            if not 0.0 <= fraction <= 1.0:
                raise WorkloadError(f"{name} is a fraction between 0 and 1, not {fraction}")
        if self.disorder + self.late > 1.0:
            raise WorkloadError("disorder and late together are more than all events")


@dataclass(frozen=True)
class WorkloadSpec:
    """A synthetic workload. Event times lie in [start_ms, start_ms + minutes * 60 000).

    `events` is the number of distinct, valid events, usage and lifecycle together. `sessions` (of one
    speaker, outside rooms), `rooms`, `users` and `nodes` are derived from it when they are None, so that
    people speak at about the pace at which people speak.
    """

    seed: int
    start_ms: int
    events: int = 20_000
    minutes: int = 15
    sessions: int | None = None
    rooms: int | None = None
    users: int | None = None
    nodes: int | None = None
    transport: TransportEffects = field(default_factory=TransportEffects)

    def __post_init__(self) -> None:
        for name in ("events", "minutes", "users", "nodes"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise WorkloadError(f"{name} must be at least 1, not {count}")
        for name in ("sessions", "rooms"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise WorkloadError(f"{name} cannot be negative: {count}")
        if self.session_count + self.room_count == 0:
            raise WorkloadError("a workload needs at least one session or one room")
        check_span(self.start_ms, self.start_ms + self.horizon_ms)

    @property
    def horizon_ms(self) -> int:
        """Length of the workload in event time."""
        return self.minutes * 60_000

    @property
    def session_count(self) -> int:
        """Sessions of one speaker, outside rooms; by default each has about 50 events."""
        return max(1, self.events // 100) if self.sessions is None else self.sessions

    @property
    def room_count(self) -> int:
        """By default half of all events belong to rooms, about 200 to each; tiny workloads have none."""
        if self.rooms is not None:
            return self.rooms
        return 0 if self.events < 100 else max(1, self.events // 400)

    @property
    def user_count(self) -> int:
        """By default users are few enough that many of them appear in several scopes."""
        return max(3, (self.session_count + 4 * self.room_count) // 3) if self.users is None else self.users

    @property
    def node_count(self) -> int:
        """By default one node serves about eight scopes."""
        if self.nodes is not None:
            return self.nodes
        return min(60, max(3, (self.session_count + self.room_count) // 8))
