"""What the stores know about a scope's frozen cells, and what has to be corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from schemas.events import LifecycleKind


class UsageSum(NamedTuple):
    """Usage of one user on one node in one window at one version of the rates, in ms."""

    window_start_ms: int
    user_id: str
    node_id: str
    rates_from_ms: int
    """`effective_from` of the version of the rates that prices it."""
    asr_time_ms: int
    nmt_time_ms: int
    tts_time_ms: int
    gpu_active_time_ms: int


@dataclass(frozen=True, slots=True)
class ScopeFacts:
    """One scope. `membership` reaches back far enough for every window from `from_window_ms` on."""

    scope: str
    from_window_ms: int
    usage: list[UsageSum]
    membership: list[tuple[LifecycleKind, str | None, int]]
    """(kind, user id, event time in ms), once each identity, in any order."""
    posted: dict[int, dict[str, int]]
    """Window start -> account -> sum of the ledger's changes (us), from `from_window_ms` on."""


class Correction(NamedTuple):
    """What a frozen cell still has to move; `changes` has every account but platform/revenue, no zeros."""

    cell_id: str
    window_start_ms: int
    rate_version: str
    changes: dict[str, int]
