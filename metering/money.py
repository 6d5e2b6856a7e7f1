"""Money: service microseconds, signed 64-bit integers, never a float.

One balance minute is 60 000 000 us. People see minutes, as Decimal; programs see `_us`.
"""

from __future__ import annotations

from decimal import Decimal

from schemas.commands import US_PER_MINUTE

__all__ = [
    "ADJUSTMENTS",
    "MAX_AMOUNT_US",
    "NODE_PREFIX",
    "REVENUE",
    "TOP_UPS",
    "USER_PREFIX",
    "US_PER_MINUTE",
    "minutes",
    "node_account",
    "user_account",
]

MAX_AMOUNT_US = 4_000_000_000_000_000
"""The most that one cell may move in all (126 service years in a minute), and one money command too.

Redis scripts subtract amounts as Lua doubles, which are exact below 2**53; twice this bound still is."""

USER_PREFIX = "user/"
NODE_PREFIX = "node/"
REVENUE = "platform/revenue"
TOP_UPS = "platform/top_ups"
ADJUSTMENTS = "platform/adjustments"


def user_account(user_id: str) -> str:
    """The account that a user's charges go to."""
    return USER_PREFIX + user_id


def node_account(node_id: str) -> str:
    """The account that a node's credit goes to."""
    return NODE_PREFIX + node_id


def minutes(amount_us: int) -> Decimal:
    """`amount_us` in balance minutes, exact to what Decimal's context keeps; for people only."""
    return Decimal(amount_us) / US_PER_MINUTE
