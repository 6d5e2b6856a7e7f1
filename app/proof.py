"""Do the books agree? Live balances, the ledger and the pure bill of the same messages, to the microsecond.

This is the small proof of the demo and the end-to-end tests, for a world that has seen nothing but the given
messages and top-ups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import redis
from clickhouse_connect.driver.client import Client

from app.views import query_rows, read_balances
from metering.money import TOP_UPS
from metering.settle import SettledLine
from schemas.redis_keys import BALANCE_PREFIX


@dataclass(frozen=True, slots=True)
class LedgerBalance:
    """What the ledger says about one account; in a whole chain `balance_us` is the sum of all changes, the
    lines are numbered without gaps, and each begins with the balance that the one before left."""

    balance_us: int
    changes_us: int
    lines: int
    last_seq: int
    breaks: int

    @property
    def is_whole(self) -> bool:
        """Whether the chain of before and after has no gap."""
        return self.balance_us == self.changes_us and self.lines == self.last_seq and self.breaks == 0


def expected_balances(settled: Iterable[SettledLine], top_ups_us: Mapping[str, int]) -> dict[str, int]:
    """What every account must hold, in us, after these bills and top-ups."""
    expected: defaultdict[str, int] = defaultdict(int)
    for line in settled:
        expected[line.account] += line.amount_us
    for account, amount_us in top_ups_us.items():
        expected[account] += amount_us
        expected[TOP_UPS] -= amount_us
    return dict(expected)


def live_balances(client: redis.Redis) -> dict[str, int]:
    """Every balance that Redis has, in us."""
    prefix = len(BALANCE_PREFIX) + 1
    accounts = [key.decode()[prefix:-1] for key in client.scan_iter(match=f"{BALANCE_PREFIX}*", count=1_000)]
    return {entry.account: entry.balance_us for entry in read_balances(client, sorted(accounts))}


def ledger_balances(client: Client, database: str) -> dict[str, LedgerBalance]:
    """Every account's last balance in the ledger, and whether its lines form a chain."""
    rows = query_rows(
        client,
        f"""
        SELECT account, argMax(balance_after_us, seq), sum(change_us), count(), max(seq),
               countIf(balance_before_us != previous_us OR balance_after_us != balance_before_us + change_us)
        FROM (
            SELECT account, seq, change_us, balance_before_us, balance_after_us,
                   lagInFrame(balance_after_us, 1, 0) OVER (PARTITION BY account ORDER BY seq
                       ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS previous_us
            FROM `{database}`.ledger FINAL
        ) GROUP BY account
        """,
        {},
    )
    return {account: LedgerBalance(*figures) for account, *figures in rows}


def disagreements(
    expected: Mapping[str, int], live: Mapping[str, int], ledger: Mapping[str, LedgerBalance]
) -> list[str]:
    """One line for every account on which the three do not agree, and one if the live balances do not sum to
    zero; none when the books are right.

    An account with nothing but zeros may be missing anywhere: a posting of zero is none.
    """
    lines = []
    if sum(live.values()):
        lines.append(f"the live balances sum to {sum(live.values())} us, not to zero")
    for account in sorted(expected.keys() | live.keys() | ledger.keys()):
        entry = ledger.get(account, LedgerBalance(0, 0, 0, 0, 0))
        amounts = (expected.get(account, 0), live.get(account, 0), entry.balance_us)
        if len(set(amounts)) > 1:
            lines.append(
                f"{account}: settle says {amounts[0]} us, Redis {amounts[1]} us, the ledger {amounts[2]} us"
            )
        elif not entry.is_whole:
            lines.append(
                f"{account}: broken chain in the ledger: {entry.lines} lines up to number {entry.last_seq}, "
                f"{entry.breaks} of them do not begin where the one before ended"
            )
    return lines
