"""Grants: minutes of a balance that are spent before the rest, and that expire.

A grant is part of its account's balance, not beside it: issuing one is a posting, and so is taking back what is
left when it expires. Which part of a charge was paid from which grant is noted on the charge's ledger line.

Laws:
- A grant covers charges for windows that start in [from, expires). Of several the one with the smallest priority
  comes first, then the one that expires first, then the smaller id.
- What is taken from grants, and given back when a cell is posted anew with less, depends on nothing but the sum of
  the covered charges since the account's grants last changed: what went beyond them is given back first. So a cell
  that is posted again and again, up and down, costs a grant what it costs in the end.
- A grant expires when the fence passes its end: until then every window that it covers may still be charged to it.
  What is charged to such a window later, by a resettle, is paid from the rest of the balance.

`sinks/lua/common.lua` does the same; one contract suite holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EXPIRED = "expired/"
"""With the grant's id behind it, the request id of the lines that take back what is left. No client can make
one."""

MAX_GRANTS = 32
"""Of one account at a time; a further one is refused, OVER_LIMIT."""


@dataclass(slots=True)
class Grant:
    """Amounts are service microseconds; `grant_id` is the request id of the command that issued it."""

    grant_id: str
    priority: int
    from_ms: int
    expires_ms: int
    amount_us: int
    left_us: int

    @property
    def order(self) -> tuple[int, int, str]:
        """Which grant is spent first."""
        return self.priority, self.expires_ms, self.grant_id

    def covers(self, window_start_ms: int) -> bool:
        """Whether charges for this window may be paid from it."""
        return self.from_ms <= window_start_ms < self.expires_ms


class Grants:
    """The grants of one account, in the order in which they are spent, and what went beyond them (us)."""

    def __init__(self, grants: Iterable[Grant] = (), beyond_us: int = 0) -> None:
        self.grants = sorted(grants, key=lambda grant: grant.order)
        self.beyond_us = beyond_us

    @classmethod
    def parse(cls, text: str, beyond_us: int = 0) -> Grants:
        """The inverse of `text`."""
        found = []
        for part in filter(None, text.split(";")):
            grant_id, *numbers = part.split(",")
            found.append(Grant(grant_id, *map(int, numbers)))
        return cls(found, beyond_us)

    def text(self) -> str:
        """As Redis keeps them: "id,priority,from,expires,amount,left;..." (ms and us)."""
        return ";".join(
            f"{g.grant_id},{g.priority},{g.from_ms},{g.expires_ms},{g.amount_us},{g.left_us}"
            for g in self.grants
        )

    def add(self, grant: Grant) -> None:
        """Issue one."""
        self.grants = sorted([*self.grants, grant], key=lambda known: known.order)
        self.beyond_us = 0

    def remove(self, grant_id: str) -> int:
        """Forget an expired one; what was left of it (us)."""
        left_us = sum(grant.left_us for grant in self.grants if grant.grant_id == grant_id)
        self.grants = [grant for grant in self.grants if grant.grant_id != grant_id]
        self.beyond_us = 0
        return left_us

    def move(self, change_us: int, window_start_ms: int) -> dict[str, int]:
        """Charge a window (a negative change), or give back (a positive one); by how much each grant changed."""
        covering = [grant for grant in self.grants if grant.covers(window_start_ms)]
        if not covering:
            return {}
        detail: dict[str, int] = {}
        if change_us < 0:
            need_us = -change_us
            for grant in covering:
                taken_us = min(grant.left_us, need_us)
                if taken_us:
                    grant.left_us -= taken_us
                    need_us -= taken_us
                    detail[grant.grant_id] = -taken_us
            self.beyond_us += need_us
        else:
            given_us = change_us - min(self.beyond_us, change_us)
            self.beyond_us -= change_us - given_us
            for grant in reversed(covering):
                back_us = min(grant.amount_us - grant.left_us, given_us)
                if back_us:
                    grant.left_us += back_us
                    given_us -= back_us
                    detail[grant.grant_id] = back_us
        return detail
