"""The process `audit`: what is done on timers, for as long as it runs: `python -m app.repair.service`. It
resettles, reconciles, and gives subscribers what their plans include.

Nothing of it is urgent, and all of it may fail, when a server is away or a flow is behind: then it is said,
counted, and done at the next turn. Drift is said and shown by the gauges; it is not repaired, except by the
next resettle.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import start_http_server

from app.errors import CommandError
from app.plan_grants import issue_plans
from app.repair.reconcile import reconcile
from app.repair.resettle import run_resettle
from schemas.plans import load_plans
from schemas.rate_card import load_rate_card
from schemas.settings import Settings, SettingsError, load_settings
from telemetry import metrics

PLANS_INTERVAL_S = 60.0

FIRST_RECONCILE_S = 60.0
"""A flow that has just started has a backlog to work off."""


def say(line: str) -> None:
    """One line on standard error."""
    print(f"metering: {line}", file=sys.stderr, flush=True)  # noqa: T201


class Timer:
    """Does something every so often; what it raises as CommandError is said, and the next turn comes."""

    def __init__(self, name: str, interval_s: float, first_s: float, turn: Callable[[], None]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._turn = turn
        self.due_at = time.monotonic() + first_s

    def run_if_due(self) -> None:
        """One turn, when it is time."""
        if time.monotonic() < self.due_at:
            return
        try:
            self._turn()
        except CommandError as problem:
            say(f"{self._name} put off: {problem}")
        self.due_at = time.monotonic() + self._interval_s


def resettle_turn(settings: Settings) -> None:
    """One resettle of what may have changed."""
    try:
        done = run_resettle(settings)
    except CommandError:
        metrics.RESETTLE_RUNS.labels("failed").inc()
        raise
    metrics.RESETTLE_RUNS.labels("superseded" if done.superseded else "complete").inc()
    metrics.RESETTLED_CELLS.inc(done.cells)
    if not done.superseded:
        metrics.RESETTLE_AGE.set(time.time())
    if done.cells or done.refused:
        say(
            f"resettle {done.token}: {done.cells} cells corrected, {done.moved_us} us moved, "
            f"{done.refused} refused"
        )


def reconcile_turn(settings: Settings) -> None:
    """One reconciliation; the gauges show what differs."""
    try:
        # Reading the whole log takes minutes of CPU for ten million messages: that is for the command.
        report = reconcile(settings, say=say, read_log=False)
    except CommandError:
        metrics.RECONCILE_RUNS.labels("failed").inc()
        raise
    metrics.RECONCILE_RUNS.labels(report.status).inc()
    for comparison in report.comparisons:
        metrics.DRIFT_US.labels(comparison.name).set(comparison.drift_us)
        metrics.DRIFT_ITEMS.labels(comparison.name).set(comparison.differing)
    for line in report.unproven:
        say(f"reconcile: {line}")
    if report.drift:
        say("the books do not agree: run `metering reconcile` and see the runbook")


def plans_turn(settings: Settings) -> None:
    """Give subscribers what their plans include."""
    issued = issue_plans(settings)
    if issued:
        say(f"plans: minutes of this period given to {issued} subscribers")


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A turn that is under way is abandoned: whatever it has done, the next one does the rest.
        signal.signal(number, lambda *_: os._exit(0))
    try:
        settings = load_settings()
        load_rate_card(settings.rate_card)
        load_plans(settings.plans)
    except SettingsError as problem:
        say(str(problem))
        raise SystemExit(2) from None
    if settings.metrics_port:
        start_http_server(settings.metrics_port)
    timers: tuple[Timer, ...] = (
        Timer(
            "resettle",
            settings.resettle_interval_s,
            settings.resettle_interval_s,
            lambda: resettle_turn(settings),
        ),
        Timer(
            "reconcile",
            settings.reconcile_interval_s,
            min(FIRST_RECONCILE_S, settings.reconcile_interval_s),
            lambda: reconcile_turn(settings),
        ),
    )
    if settings.plans is not None:
        timers = (*timers, Timer("plans", PLANS_INTERVAL_S, 0.0, lambda: plans_turn(settings)))
    ready = os.environ.get("METERING_READY_FILE")
    if ready:
        Path(ready).touch()
    while not stop.wait(0.2):
        for timer in timers:
            timer.run_if_due()


if __name__ == "__main__":
    main()
