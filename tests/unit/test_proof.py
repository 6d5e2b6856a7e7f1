"""The small proof notices every kind of disagreement."""

from __future__ import annotations

from app.proof import LedgerBalance, disagreements, expected_balances
from metering.settle import SettledLine

EXPECTED = {"user/u": -7, "node/n": 3, "platform/revenue": 4}
LEDGER = {account: LedgerBalance(amount, amount, 2, 2, 0) for account, amount in EXPECTED.items()}


def test_books_that_agree_have_no_lines() -> None:
    """The same amounts everywhere and whole chains."""
    assert disagreements(EXPECTED, EXPECTED, LEDGER) == []


def test_one_microsecond_in_one_place_is_noticed() -> None:
    """Whichever of the three is off, the account is named with all amounts."""
    off = EXPECTED | {"user/u": -8}
    line = "user/u: settle says -7 us, Redis -8 us, the ledger -7 us"
    assert disagreements(EXPECTED, off, LEDGER) == ["the live balances sum to -1 us, not to zero", line]
    assert len(disagreements(off, EXPECTED, LEDGER)) == 1
    ledger = LEDGER | {"user/u": LedgerBalance(-8, -8, 2, 2, 0)}
    assert len(disagreements(EXPECTED, EXPECTED, ledger)) == 1


def test_an_account_that_one_of_them_lacks_or_has_too_many_is_noticed() -> None:
    """Missing counts as zero, so only an amount that is really missing differs."""
    without = {account: amount for account, amount in EXPECTED.items() if account != "node/n"}
    assert len(disagreements(EXPECTED, without, LEDGER)) == 2
    ghosts = {"user/ghost": 1, "user/spook": -1}
    assert len(disagreements(EXPECTED, EXPECTED | ghosts, LEDGER)) == 2
    assert disagreements(EXPECTED | {"user/free": 0}, EXPECTED, LEDGER) == []


def test_a_broken_chain_is_noticed_though_the_sums_are_right() -> None:
    """A gap in the numbers, a line that does not begin where the last ended, or changes that do not add up."""
    for chain in (
        LedgerBalance(-7, -7, 2, 3, 0),
        LedgerBalance(-7, -7, 2, 2, 1),
        LedgerBalance(-7, -6, 2, 2, 0),
    ):
        [line] = disagreements(EXPECTED, EXPECTED, LEDGER | {"user/u": chain})
        assert line.startswith("user/u: broken chain in the ledger")


def test_expected_balances_add_bills_and_top_ups() -> None:
    """A top-up has its counter-posting, so everything still sums to zero."""
    settled = [
        SettledLine("user/u", "session/s@0", -7, 1),
        SettledLine("node/n", "session/s@0", 3, 1),
        SettledLine("platform/revenue", "session/s@0", 4, 1),
        SettledLine("user/u", "session/s@60000", -1, 1),
        SettledLine("platform/revenue", "session/s@60000", 1, 1),
    ]
    expected = expected_balances(settled, {"user/u": 100})
    assert expected == {"user/u": 92, "node/n": 3, "platform/revenue": 5, "platform/top_ups": -100}
    assert sum(expected.values()) == 0
