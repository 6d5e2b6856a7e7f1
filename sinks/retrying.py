"""Waiting for a server that is away: try again for ever, with growing, jittered pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from schemas.ports import Interrupted
from telemetry.quiet import ignore_retry

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
LISTEN_EVERY_S = 0.1
"""How soon a pause notices that it should stop."""


def never_stop() -> bool:
    """The default for `stop`: keep trying."""
    return False


def retrying(
    operation: Callable[[], Result],
    *,
    heals: Callable[[Exception], bool],
    stop: Callable[[], bool] = never_stop,
    on_retry: Callable[[Exception], None] = ignore_retry,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> Result:
    """Run an idempotent `operation` until it succeeds, and return its result.

    Only errors of which `heals` says that they pass are tried again, each reported to `on_retry` first;
    others go through unchanged. The pause doubles from 0.05 s to 5 s, of which between half and all is slept
    (`jitter` gives 0..1), so that workers do not return in step. Raises `Interrupted` when `stop` says so.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return operation()
        except Exception as error:
            if not heals(error):
                raise
            on_retry(error)
            if not _sleep_unless_stopped(pause_s * (0.5 + 0.5 * jitter()), stop, sleep):
                raise Interrupted(f"stopped while waiting for a server that is away: {error}") from error
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def _sleep_unless_stopped(pause_s: float, stop: Callable[[], bool], sleep: Callable[[float], None]) -> bool:
    """Sleep in short naps; False as soon as `stop` says so."""
    while pause_s > 0:
        if stop():
            return False
        nap_s = min(pause_s, LISTEN_EVERY_S)
        sleep(nap_s)
        pause_s -= nap_s
    return not stop()
