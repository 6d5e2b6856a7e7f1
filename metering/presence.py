"""Presence: who was in a room during any part of a window, as a function of a set of membership events.

Laws:
- An interval is [joined, left). It is ended only by the user's `left`, by the room's `closed`, or
  `presence_max` after the user's last `joined`; a `joined` while present renews it.
- A `left` without a `joined` is ignored. An interval of zero length is none.
- At equal times the order is joined, left, closed: so an end at the very time of a join ends it.
- The order in which events are added does not matter; adding one twice changes nothing.

One `joined` at j therefore covers [j, min(first end at or after j, j + presence_max)), and a user's presence
is the union of what each `joined` covers.

Below the fence only the latest join and the latest end per user are kept. That is exact for every window
above it: an earlier join is either ended before the latest one or covered by it, and of the ends below the
fence only one at or after the latest join matters, which the latest end decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from schemas.events import LifecycleKind

PRESENCE_MAX_MS = 12 * 3_600_000

Times = dict[str, list[int]]


class Stay(NamedTuple):
    """What one `joined` covers: [joined_ms, until_ms), and what ends it."""

    joined_ms: int
    until_ms: int
    ended_by: LifecycleKind | None
    """LEFT or CLOSED; None for `presence_max`."""


class Presence:
    """The members of one room. Times are event times in ms; `frozen_before_ms` is the fence."""

    __slots__ = (
        "_cache",
        "_closed",
        "_closed_below",
        "_end_below",
        "_join_below",
        "_joins",
        "_lefts",
        "frozen_before_ms",
        "presence_max_ms",
    )

    def __init__(self, presence_max_ms: int = PRESENCE_MAX_MS, frozen_before_ms: int | None = None) -> None:
        self.presence_max_ms = presence_max_ms
        self.frozen_before_ms = frozen_before_ms
        self._joins: Times = {}
        self._lefts: Times = {}
        self._closed: list[int] = []
        self._join_below: dict[str, int] = {}
        self._end_below: dict[str, int] = {}
        self._closed_below: int | None = None
        self._cache: dict[int, frozenset[str]] = {}

    def add(self, kind: LifecycleKind, user_id: str | None, time_ms: int) -> None:
        """Take note of one membership event; session kinds change nothing."""
        self._cache.clear()
        below = self.frozen_before_ms is not None and time_ms < self.frozen_before_ms
        if kind is LifecycleKind.CLOSED:
            if below:
                self._closed_below = _latest(self._closed_below, time_ms)
            else:
                _add_time(self._closed, time_ms)
        elif user_id is not None and kind is LifecycleKind.JOINED:
            self._add_for(user_id, time_ms, self._join_below if below else None, self._joins)
        elif user_id is not None and kind is LifecycleKind.LEFT:
            self._add_for(user_id, time_ms, self._end_below if below else None, self._lefts)

    @staticmethod
    def _add_for(user_id: str, time_ms: int, below: dict[str, int] | None, above: Times) -> None:
        if below is not None:
            below[user_id] = _latest(below.get(user_id), time_ms)
        else:
            _add_time(above.setdefault(user_id, []), time_ms)

    def replace(self, events: list[tuple[LifecycleKind, str | None, int]]) -> None:
        """Make `events` the membership events at or above the fence; those below stay as folded."""
        self._joins, self._lefts, self._closed = {}, {}, []
        self._cache.clear()
        for kind, user_id, time_ms in events:
            self.add(kind, user_id, time_ms)

    def members(self, window_start: int, window_end: int) -> frozenset[str]:
        """User ids present during any part of [window_start, window_end). Exact at or above the fence."""
        cached = self._cache.get(window_start)
        if cached is None:
            users = self._joins.keys() | self._join_below.keys()
            cached = frozenset(user for user in users if self._present(user, window_start, window_end))
            self._cache[window_start] = cached
        return cached

    def stay(self, user_id: str, window_start: int, window_end: int) -> Stay | None:
        """Why the user is among the members of the window: the latest `joined` that makes it so, and how far it
        reaches; None for who is not. Exact where `members` is, its end only without a fence."""
        joined = self._joined_for(user_id, window_start, window_end)
        if joined is None:
            return None
        until = self._covered_until(user_id, joined)
        for kind, ends in (
            (LifecycleKind.LEFT, self._lefts.get(user_id, ())),
            (LifecycleKind.CLOSED, self._closed),
        ):
            index = bisect_left(ends, until)
            if index < len(ends) and ends[index] == until:
                return Stay(joined, until, kind)
        return Stay(joined, until, None)

    def _present(self, user_id: str, start: int, end: int) -> bool:
        return self._joined_for(user_id, start, end) is not None

    def _joined_for(self, user_id: str, start: int, end: int) -> int | None:
        """The latest `joined` that makes the user present during a part of [start, end)."""
        joins = self._joins.get(user_id, ())
        for index in range(bisect_left(joins, end) - 1, -1, -1):
            joined = joins[index]
            if self._covered_until(user_id, joined) > max(start, joined):
                return joined
            if joined <= start:
                return None
        joined_below = self._join_below.get(user_id)
        if joined_below is None:
            return None
        for ended_below in (self._closed_below, self._end_below.get(user_id)):
            if ended_below is not None and ended_below >= joined_below:
                return None
        return joined_below if self._covered_until(user_id, joined_below) > max(start, joined_below) else None

    def _covered_until(self, user_id: str, joined: int) -> int:
        until = joined + self.presence_max_ms
        for ends in (self._lefts.get(user_id, ()), self._closed):
            index = bisect_left(ends, joined)
            if index < len(ends):
                until = min(until, ends[index])
        return until

    def raise_fence(self, frozen_before_ms: int) -> None:
        """Fold everything before the new fence, and forget what can no longer reach a window above it."""
        if self.frozen_before_ms is not None and frozen_before_ms <= self.frozen_before_ms:
            return
        self.frozen_before_ms = frozen_before_ms
        self._cache.clear()
        _fold(self._joins, self._join_below, frozen_before_ms)
        _fold(self._lefts, self._end_below, frozen_before_ms)
        cut = bisect_left(self._closed, frozen_before_ms)
        if cut:
            self._closed_below = _latest(self._closed_below, self._closed[cut - 1])
            del self._closed[:cut]
        horizon = frozen_before_ms - self.presence_max_ms
        for times in (self._join_below, self._end_below):
            for user_id in [user_id for user_id, time_ms in times.items() if time_ms <= horizon]:
                del times[user_id]
        if self._closed_below is not None and self._closed_below <= horizon:
            self._closed_below = None

    @property
    def empty(self) -> bool:
        """Whether nothing is remembered, so that forgetting this room changes no later answer."""
        return (
            not (self._joins or self._lefts or self._closed or self._join_below or self._end_below)
            and self._closed_below is None
        )

    def folded(self) -> tuple[dict[str, int], dict[str, int], int | None]:
        """(latest join, latest end, latest close) below the fence, for a snapshot."""
        return dict(self._join_below), dict(self._end_below), self._closed_below

    def restore_folded(self, joins: dict[str, int], ends: dict[str, int], closed: int | None) -> None:
        """The inverse of `folded`."""
        self._join_below, self._end_below, self._closed_below = dict(joins), dict(ends), closed
        self._cache.clear()


def _latest(known: int | None, time_ms: int) -> int:
    return time_ms if known is None else max(known, time_ms)


def _add_time(times: list[int], time_ms: int) -> None:
    index = bisect_left(times, time_ms)
    if index == len(times) or times[index] != time_ms:
        insort(times, time_ms)


def _fold(above: Times, below: dict[str, int], frozen_before_ms: int) -> None:
    for user_id in list(above):
        times = above[user_id]
        cut = bisect_left(times, frozen_before_ms)
        if cut:
            below[user_id] = _latest(below.get(user_id), times[cut - 1])
            del times[:cut]
            if not times:
                del above[user_id]
