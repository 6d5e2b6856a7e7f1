"""What a reconciliation says of one look at a cell, and how a report adds up."""

from __future__ import annotations

import json

import pytest

from app.repair.reconcile import _known_offset
from metering.money import MAX_AMOUNT_US, REVENUE
from metering.reconcile import (
    ACCOUNTS_NAMED,
    FIRST_DIFFERENCES,
    CellLook,
    Comparison,
    Report,
    Verdict,
    agrees_frozen,
    judge_live,
    moved_us,
    over_limit,
)

OLD = {"user/u": -10, REVENUE: 10}
NEW = {"user/u": -30, REVENUE: 30}
NEWER = {"user/u": -70, REVENUE: 70}
WRONG = {"user/u": -11, REVENUE: 11}


def look(
    posted: dict[str, int],
    stored: dict[str, int],
    at_cut: dict[str, int],
    at_posting: dict[str, int] | None,
    covers: bool = False,
) -> CellLook:
    return CellLook("session/s", 0, posted, stored, at_cut, at_posting, covers, 0)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (look(NEW, NEW, NEW, NEW), Verdict.AGREES),
        # More came after the cut: stored, not posted yet.
        (look(NEW, NEWER, NEW, NEW), Verdict.AGREES),
        # Posted, and then more, both after the cut; only the revision tells what the posting knew.
        (look(NEW, NEWER, OLD, NEW, covers=True), Verdict.AGREES),
        # The posting knew less than the log held at the cut.
        (look(OLD, NEW, NEW, OLD), Verdict.BEHIND),
        (look({}, NEW, NEW, {}), Verdict.BEHIND),
        (look(WRONG, NEW, NEW, OLD), Verdict.DIFFERS),
        (look(WRONG, NEW, NEW, NEW, covers=True), Verdict.DIFFERS),
        # Several partitions: what the posting knew cannot be told.
        (look(OLD, NEWER, NEW, None), Verdict.UNCLEAR),
        (look(NEWER, NEWER, NEW, None), Verdict.AGREES),
    ],
)
def test_a_live_cell_is_judged_by_what_its_posting_knew(seen: CellLook, verdict: Verdict) -> None:
    """All that is stored, all up to the cut, or exactly what the last posting knew: one of them must be posted."""
    assert judge_live(seen) is verdict


def test_a_frozen_cell_has_nothing_to_wait_for() -> None:
    """Only what came late after the cut is not held against it."""
    assert agrees_frozen(look(NEW, NEWER, NEW, None))
    assert not agrees_frozen(look(OLD, NEW, NEW, OLD))


@pytest.mark.parametrize(
    ("revision", "generation", "partitions", "stored", "known"),
    [
        (0, 0, set(), {}, 0),
        (7, 0, {2}, {2: 7}, 7),
        (7, 0, {2}, {2: 6}, None),
        (7, 0, {1, 2}, {1: 9, 2: 9}, None),
        ((3 << 40) + 7, 3, {0}, {0: 7}, 7),
        (7, 3, {0}, {0: 7}, None),
    ],
)
def test_what_a_posting_knew_is_told_by_its_revision(
    revision: int, generation: int, partitions: set[int], stored: dict[int, int], known: int | None
) -> None:
    """On one partition, in the log that is read now, once the store has all of it."""
    assert _known_offset(revision, generation, partitions, stored) == known


def test_the_limit_of_a_cell_is_that_of_settlement() -> None:
    """At the limit it is posted, one more is not; revenue does not count."""
    assert not over_limit({"user/u": -MAX_AMOUNT_US, REVENUE: MAX_AMOUNT_US})
    assert over_limit({"user/u": -MAX_AMOUNT_US - 1, REVENUE: MAX_AMOUNT_US + 1})


def test_what_is_missing_is_expected_less_found() -> None:
    """Accounts on either side; equal ones are left out."""
    assert moved_us({"a": 5, "b": 1, "c": 2}, {"a": 3, "b": 1, "d": 4}) == {"a": 2, "c": 2, "d": -4}


def test_a_cell_that_differs_counts_its_accounts_and_their_money() -> None:
    """platform/revenue is an account that drifts, but its money is that of the others once more."""
    cells = Comparison("cells", "")
    cells.cell_differs("live cell differs", look(WRONG, NEW, NEW, NEW))
    assert (cells.differing, cells.drift_us, cells.accounts_drifting) == (1, 19, 2)
    assert cells.first[0].where == "session/s@0"
    assert cells.first[0].found == WRONG
    assert cells.first[0].expected == NEW


def test_a_flood_of_one_kind_does_not_hide_another() -> None:
    """The first differences are shown, and the first of each kind; accounts are told apart up to a bound."""
    balances = Comparison("redis_ledger", "")
    for number in range(ACCOUNTS_NAMED + 5):
        balances.account_differs("balance differs", f"user/{number}", 1, 2, 1)
    balances.account_differs("no such line in the ledger", "user/x", 1, None, 1)
    assert balances.differing == ACCOUNTS_NAMED + 6
    assert balances.accounts_drifting == ACCOUNTS_NAMED
    assert len(balances.first) == FIRST_DIFFERENCES + 1
    assert balances.first[-1].where == "user/x"


def test_a_report_proves_only_what_was_decided() -> None:
    """Open questions are no drift and no proof; drift is said first."""
    open_question = Comparison("flows", "")
    report = Report(comparisons=[open_question, Comparison("cells", "")])
    assert (report.status, report.exit_code) == ("agrees", 0)
    open_question.leave_open("the ledger is behind", 5)
    assert (report.status, report.drift, report.exit_code) == ("unproven", False, 1)
    assert report.unproven == ["flows: the ledger is behind (5)"]
    report.comparison("cells").differs("live cell differs", "session/s@0", 1, 2, -3)
    assert (report.status, report.drift, report.drift_us, report.exit_code) == ("drift", True, 3, 1)
    shown = json.loads(report.to_json())
    assert shown["comparisons"][1]["first"] == [
        {"kind": "live cell differs", "where": "session/s@0", "found": 1, "expected": 2}
    ]
