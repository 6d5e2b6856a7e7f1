"""Waiting for a server that is away."""

from __future__ import annotations

import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, DataError, OperationalError

from schemas.ports import Interrupted
from sinks.clickhouse import heals
from sinks.retrying import retrying


class Flaky:
    """An operation that fails a number of times before it succeeds, and the clock that its pauses move."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.reported: list[str] = []
        self.slept_s = 0.0
        self.naps_s: list[float] = []

    def run(self) -> str:
        """Fail, or succeed."""
        if self.failures:
            self.failures -= 1
            raise ConnectionError(f"{self.failures} more")
        return "stored"

    def sleep(self, nap_s: float) -> None:
        """Let time pass."""
        self.naps_s.append(nap_s)
        self.slept_s += nap_s

    def report(self, error: Exception) -> None:
        """Note a retry."""
        self.reported.append(str(error))


def test_success_needs_no_pause() -> None:
    """What works at once is returned at once."""
    flaky = Flaky(failures=0)
    assert retrying(flaky.run, heals=lambda error: True, sleep=flaky.sleep) == "stored"
    assert flaky.slept_s == 0


def test_each_failure_is_reported_and_tried_again() -> None:
    """The callback sees every failure that was tried again."""
    flaky = Flaky(failures=3)
    result = retrying(flaky.run, heals=lambda error: True, on_retry=flaky.report, sleep=flaky.sleep)
    assert result == "stored"
    assert flaky.reported == ["2 more", "1 more", "0 more"]


@pytest.mark.parametrize(("failures", "total_s"), [(1, 0.05), (2, 0.15), (7, 6.35), (8, 11.35), (10, 21.35)])
def test_pauses_double_up_to_five_seconds(failures: int, total_s: float) -> None:
    """0.05, 0.1, 0.2, ... 3.2, then 5 s each, in naps of at most 0.1 s."""
    flaky = Flaky(failures)
    retrying(flaky.run, heals=lambda error: True, sleep=flaky.sleep, jitter=lambda: 1.0)
    assert flaky.slept_s == pytest.approx(total_s)
    assert max(flaky.naps_s) <= 0.1


def test_jitter_halves_a_pause_at_most() -> None:
    """At the lower end of the jitter half of the pause remains."""
    flaky = Flaky(failures=1)
    retrying(flaky.run, heals=lambda error: True, sleep=flaky.sleep, jitter=lambda: 0.0)
    assert flaky.slept_s == pytest.approx(0.025)


def test_an_error_that_does_not_heal_goes_through() -> None:
    """It is raised as it is, at once, and not reported as a retry."""
    flaky = Flaky(failures=1)
    with pytest.raises(ConnectionError, match="0 more"):
        retrying(flaky.run, heals=lambda error: False, on_retry=flaky.report, sleep=flaky.sleep)
    assert flaky.reported == [] and flaky.slept_s == 0


def test_a_stop_ends_the_wait_within_a_nap() -> None:
    """A process that is told to stop does not sit out a pause."""
    flaky = Flaky(failures=1_000)
    with pytest.raises(Interrupted, match="server that is away"):
        retrying(
            flaky.run,
            heals=lambda error: True,
            stop=lambda: flaky.slept_s >= 20,
            sleep=flaky.sleep,
            jitter=lambda: 1.0,
        )
    assert flaky.slept_s == pytest.approx(20, abs=0.11)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError("refused"), True),
        (TimeoutError("timed out"), True),
        (OperationalError("no answer"), True),
        (DatabaseError("a proxy's 502", code=None), True),
        (DatabaseError("too many parts", code=252), True),
        (DatabaseError("memory limit", code=241), True),
        (DatabaseError("unknown table", code=60), False),
        (OperationalError("unknown database", code=81), False),
        (DatabaseError("type mismatch", code=53), False),
        (DatabaseError("wrong password", code=516), False),
        (DataError("does not fit"), False),
        (ValueError("a bug"), False),
    ],
)
def test_which_errors_of_clickhouse_pass(error: Exception, expected: bool) -> None:
    """Being away, busy or full passes; a wrong table, type or password does not."""
    assert heals(error) is expected
