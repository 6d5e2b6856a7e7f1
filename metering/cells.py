"""Cells: one scope in one 60 s tumbling window of event time, and the vector that settles it.

Laws:
- A cell exists only with usage.
- A session cell's events are paid each by its own user. A room cell's total cost is split equally among its
  payers: everyone present during any part of the window, together with everyone who has usage in it.
- Each payer owes `total // n`; the `total % n` microseconds left over go, one each, to the payers whose
  `sha256("<cell_id>|<user_id>")` sorts first. So shares sum to the cost, and nobody is favoured for long.
- Each node is credited for its own events; `platform/revenue` gets cost - credit. So a cell sums to zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from heapq import nsmallest

from metering.money import REVENUE, node_account, user_account

WINDOW_MS = 60_000
ROOM_PREFIX = "room/"
SESSION_PREFIX = "session/"


def window_start_ms(time_ms: int) -> int:
    """The start of the window that holds `time_ms`; a window is [start, start + 60 000)."""
    return time_ms - time_ms % WINDOW_MS


def cell_id(scope: str, window_start: int) -> str:
    """`<scope>@<window_start_ms>`."""
    return f"{scope}@{window_start}"


def is_room(scope: str) -> bool:
    """Whether the scope's cost is shared by its members."""
    return scope.startswith(ROOM_PREFIX)


def scope_ids(scope: str) -> tuple[str, str]:
    """(session_id, room_id) of a scope; the one it is not stands as an empty string."""
    if is_room(scope):
        return "", scope[len(ROOM_PREFIX) :]
    return scope[len(SESSION_PREFIX) :], ""


def remainder_key(cell: str, user_id: str) -> bytes:
    """Whose digest sorts first pays a microsecond of what the division leaves over; sorts as its hex text does."""
    return sha256(f"{cell}|{user_id}".encode()).digest()


def split_equally(cell: str, total_us: int, payers: Collection[str]) -> dict[str, int]:
    """What each of `payers` (user ids, at least one) owes of `total_us` (not negative)."""
    share, left_over = divmod(total_us, len(payers))
    owed = dict.fromkeys(payers, share)
    if left_over:
        for user_id in nsmallest(left_over, payers, key=lambda user_id: remainder_key(cell, user_id)):
            owed[user_id] += 1
    return owed


def cell_vector(
    scope: str,
    window_start: int,
    cost_us_by_user: Mapping[str, int],
    credit_us_by_node: Mapping[str, int],
    members: Collection[str],
) -> dict[str, int]:
    """The cell's whole vector: account -> change of its balance in us, zeros included; it sums to zero.

    `members` are the user ids present during any part of the window; a session cell ignores them.
    """
    total_us = sum(cost_us_by_user.values())
    owed: Mapping[str, int] = cost_us_by_user
    if is_room(scope):
        owed = split_equally(
            cell_id(scope, window_start), total_us, cost_us_by_user.keys() | frozenset(members)
        )
    vector = {user_account(user_id): -amount_us for user_id, amount_us in owed.items()}
    vector.update((node_account(node_id), amount_us) for node_id, amount_us in credit_us_by_node.items())
    vector[REVENUE] = total_us - sum(credit_us_by_node.values())
    return vector
