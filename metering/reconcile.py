"""Reconciliation: what two stores say about the same thing, and whether a difference is drift.

Laws:
- A comparison is of facts at one cut. What lies after the cut proves nothing and is not held against anybody.
- A live cell is right when the ledger has what the stored events say: all of them, or those that the log held
  at the cut, or exactly those that the cell's last posting knew, which its revision tells. Only the last one
  holds at every moment; the first two come true when the flows have caught up.
- A frozen cell has nothing to wait for: it is right, or the next resettle will correct it, or nobody will.
- What could not be decided is said apart, as unproven. It is not drift, and it is not agreement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from metering.cells import cell_id
from metering.money import MAX_AMOUNT_US, REVENUE

FIRST_DIFFERENCES = 20
"""How many differences of a comparison the report shows."""

ACCOUNTS_NAMED = 100_000
"""How many drifting accounts are told apart; bounds the memory of a report on books that are all wrong."""

Vector = Mapping[str, int]


class Verdict(StrEnum):
    """What is to be said of a live cell after one look."""

    AGREES = "agrees"
    BEHIND = "behind"
    """What was posted is exact, but newer events that the log held at the cut are not in it yet."""
    DIFFERS = "differs"
    """What was posted is not what the events say that it knew."""
    UNCLEAR = "unclear"
    """It differs from all that is stored, and what the last posting knew cannot be told at this moment."""


@dataclass(frozen=True, slots=True)
class CellLook:
    """One cell at one moment. Vectors without zeros; `at_posting` is None when it cannot be told what the last
    posting knew: its scope lies on several partitions, its revision is from another log, or the usage store does
    not have all of it yet."""

    scope: str
    window_start_ms: int
    posted: Vector
    stored: Vector
    at_cut: Vector
    at_posting: Vector | None
    posting_covers_cut: bool
    appended_at_ms: int
    """Append time of the last event before the cut that may shape the cell; 0 for none."""

    @property
    def cell_id(self) -> str:
        return cell_id(self.scope, self.window_start_ms)


def judge_live(look: CellLook) -> Verdict:
    """Whether the ledger has what it should have of a cell above the fence."""
    if look.posted in (look.stored, look.at_cut):
        return Verdict.AGREES
    if look.at_posting is None:
        return Verdict.UNCLEAR
    if look.posted != look.at_posting:
        return Verdict.DIFFERS
    return Verdict.AGREES if look.posting_covers_cut else Verdict.BEHIND


def agrees_frozen(look: CellLook) -> bool:
    """Whether the ledger has what it should have of a cell before the fence; late usage after the cut does not
    count against it."""
    return look.posted in (look.stored, look.at_cut)


def over_limit(vector: Vector) -> bool:
    """Whether the cell moves more than any cell may, so that nobody will ever post it."""
    return sum(abs(amount) for account, amount in vector.items() if account != REVENUE) > MAX_AMOUNT_US


def without_zeros(vector: Vector) -> dict[str, int]:
    """The amounts that are any."""
    return {account: amount for account, amount in vector.items() if amount}


def moved_us(expected: Vector, found: Vector) -> dict[str, int]:
    """Account -> how much is missing from `found`, for every account that differs."""
    return without_zeros(
        {
            account: expected.get(account, 0) - found.get(account, 0)
            for account in sorted(expected.keys() | found.keys())
        }
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two stores do not agree on. `where` is an account, a cell, an outbox entry or a message."""

    kind: str
    where: str
    found: Any
    expected: Any


@dataclass(slots=True)
class Comparison:
    """Two stores compared. `drift_us` adds up magnitudes; of a cell's accounts all but platform/revenue, which
    would only say the same again."""

    name: str
    about: str
    checked: int = 0
    differing: int = 0
    drift_us: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    first: list[Difference] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    """Counts that are worth knowing and are no drift."""
    unproven: dict[str, int] = field(default_factory=dict)
    """Why -> how many could not be decided."""
    _accounts: set[str] = field(default_factory=set)

    @property
    def accounts_drifting(self) -> int:
        return len(self._accounts)

    def differs(self, kind: str, where: str, found: Any, expected: Any, drift_us: int = 0) -> None:
        """Take note of one difference."""
        self.differing += 1
        self.drift_us += abs(drift_us)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        # Of each kind the first, so that a flood of one does not hide another.
        if len(self.first) < FIRST_DIFFERENCES or self.kinds[kind] == 1:
            self.first.append(Difference(kind, where, found, expected))

    def account_differs(self, kind: str, account: str, found: Any, expected: Any, drift_us: int) -> None:
        """The same, of one account."""
        self._name(account)
        self.differs(kind, account, found, expected, drift_us)

    def cell_differs(self, kind: str, look: CellLook) -> None:
        """The same, of one cell; what is found is the ledger's sum, what is expected is recomputed."""
        missing = moved_us(look.stored, look.posted)
        for account in missing:
            self._name(account)
        drift_us = sum(abs(amount) for account, amount in missing.items() if account != REVENUE)
        accounts = sorted(missing)[:FIRST_DIFFERENCES]
        self.differs(
            kind,
            look.cell_id,
            {account: look.posted.get(account, 0) for account in accounts},
            {account: look.stored.get(account, 0) for account in accounts},
            drift_us,
        )

    def leave_open(self, why: str, count: int = 1) -> None:
        """Take note of what could not be decided."""
        self.unproven[why] = self.unproven.get(why, 0) + count

    def count(self, figure: str, number: int = 1) -> None:
        """Add to a figure."""
        self.figures[figure] = self.figures.get(figure, 0) + number

    def _name(self, account: str) -> None:
        if len(self._accounts) < ACCOUNTS_NAMED:
            self._accounts.add(account)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "about": self.about,
            "checked": self.checked,
            "differing": self.differing,
            "drift_us": self.drift_us,
            "accounts_drifting": self.accounts_drifting,
            "kinds": self.kinds,
            "unproven": self.unproven,
            "figures": self.figures,
            "first": [
                {"kind": each.kind, "where": each.where, "found": each.found, "expected": each.expected}
                for each in self.first
            ],
        }


@dataclass(slots=True)
class Report:
    """What a reconciliation found.

    As JSON: `status` (agrees, drift or unproven), `drift`, `drift_us`, `accounts_drifting`, `unproven` (a list of
    reasons), `cut` (what was compared: the number of the last outbox entry, the fence, the offsets of each
    partition, and when) and `comparisons`, each with

    - `name`, and in `about` what is compared;
    - `checked`, `differing`, `drift_us`, `accounts_drifting`;
    - `kinds`: how many differences of which kind;
    - `unproven`: how many could not be decided, by reason;
    - `figures`: counts that are no drift;
    - `first`: the first differences, each with `kind`, `where`, `found` and `expected`.
    """

    cut: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    def comparison(self, name: str) -> Comparison:
        """By its name."""
        return next(each for each in self.comparisons if each.name == name)

    @property
    def drift(self) -> bool:
        """Whether any two stores differ."""
        return any(each.differing for each in self.comparisons)

    @property
    def drift_us(self) -> int:
        """Sum of magnitudes over all comparisons: one fault may be seen by several."""
        return sum(each.drift_us for each in self.comparisons)

    @property
    def accounts_drifting(self) -> int:
        """Of the comparison that has most of them."""
        return max((each.accounts_drifting for each in self.comparisons), default=0)

    @property
    def unproven(self) -> list[str]:
        """What could not be decided, one line each."""
        return [
            f"{each.name}: {why} ({count})"
            for each in self.comparisons
            for why, count in sorted(each.unproven.items())
        ]

    @property
    def status(self) -> str:
        """`agrees` only when everything was decided and nothing differs."""
        if self.drift:
            return "drift"
        return "unproven" if self.unproven else "agrees"

    @property
    def exit_code(self) -> int:
        """0 only when the books are proven right: who could not be asked has not agreed."""
        return 0 if self.status == "agrees" else 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "drift": self.drift,
            "drift_us": self.drift_us,
            "accounts_drifting": self.accounts_drifting,
            "unproven": self.unproven,
            "cut": self.cut,
            "comparisons": [each.as_dict() for each in self.comparisons],
        }

    def to_json(self) -> bytes:
        """The report as one JSON document, indented for people."""
        return json.dumps(self.as_dict(), indent=2).encode() + b"\n"
