"""The clock as a Bytewax source: the start of each period, once when it begins, and once at the start of a flow."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition


def period_start_ms(now_ms: int, period_ms: int) -> int:
    """The start of the period that `now_ms` lies in; periods are counted from the Unix epoch."""
    return now_ms // period_ms * period_ms


class _Periods(StatefulSourcePartition[int, None]):
    def __init__(self, now_ms: Callable[[], int], period_ms: int) -> None:
        self._now_ms = now_ms
        self._period_ms = period_ms
        self._last_ms: int | None = None

    def next_batch(self) -> list[int]:
        """The period that lies now, unless it was told. Of periods that a stall skipped only the last one is
        told."""
        start_ms = period_start_ms(self._now_ms(), self._period_ms)
        # A clock that is set back does not bring a period again.
        if self._last_ms is not None and start_ms <= self._last_ms:
            return []
        self._last_ms = start_ms
        return [start_ms]

    def next_awake(self) -> datetime | None:
        """At the start of the next period, or in a minute: the clock may be set."""
        now_ms = self._now_ms()
        wait_ms = period_start_ms(now_ms, self._period_ms) + self._period_ms - now_ms
        return datetime.now(UTC) + timedelta(milliseconds=min(wait_ms, 60_000))

    def snapshot(self) -> None:
        """Nothing: what was done in a period is known where it was done."""


class PeriodSource(FixedPartitionedSource[int, None]):
    """Starts of periods (ms since the Unix epoch) of `period_ms`, by the clock `now_ms`."""

    def __init__(self, now_ms: Callable[[], int], period_ms: int) -> None:
        self._now_ms = now_ms
        self._period_ms = period_ms

    def list_parts(self) -> list[str]:
        """The clock."""
        return ["clock"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _Periods:
        """A clock that has told nothing."""
        return _Periods(self._now_ms, self._period_ms)
