"""Grants: what a charge takes from which, and what comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metering.grants import Grant, Grants

EVER_MS = 10**15


def grant(name: str, amount_us: int, priority: int = 0, from_ms: int = 0, expires_ms: int = EVER_MS) -> Grant:
    return Grant(name, priority, from_ms, expires_ms, amount_us, amount_us)


def left(grants: Grants) -> dict[str, int]:
    return {known.grant_id: known.left_us for known in grants.grants}


def test_a_charge_takes_from_the_first_grants_and_the_rest_goes_beyond() -> None:
    """By priority, then by expiry; and comes back the other way round."""
    grants = Grants([grant("late", 10), grant("points", 10, priority=1), grant("soon", 10, expires_ms=99)])
    assert grants.move(-25, 0) == {"soon": -10, "late": -10, "points": -5}
    assert grants.move(-8, 0) == {"points": -5}
    assert grants.beyond_us == 3
    assert grants.move(4, 0) == {"points": 1}
    assert (grants.beyond_us, left(grants)) == (0, {"soon": 0, "late": 0, "points": 1})
    assert grants.move(100, 0) == {"points": 9, "late": 10, "soon": 10}


def test_only_windows_that_it_covers_are_paid_from_a_grant() -> None:
    """From its beginning on, and up to but not with its end."""
    grants = Grants([grant("g", 10, from_ms=60_000, expires_ms=120_000)])
    assert grants.move(-1, 0) == grants.move(-1, 120_000) == {}
    assert grants.move(-3, 60_000) == {"g": -3}
    assert grants.beyond_us == 0


def test_what_is_kept_comes_back() -> None:
    """As text, and with what is removed."""
    grants = Grants([grant("b", 7), grant("a", 5, 1, 2, 3)], 9)
    again = Grants.parse(grants.text(), 9)
    assert (again.grants, again.beyond_us) == (grants.grants, 9)
    assert Grants.parse("").grants == []
    assert again.remove("a") == 5
    assert (left(again), again.beyond_us) == ({"b": 7}, 0)


amounts = st.integers(0, 50)


@given(
    sizes=st.lists(st.tuples(amounts, st.integers(0, 2)), max_size=4),
    totals=st.lists(st.integers(0, 300), min_size=1, max_size=30),
)
def test_only_the_sum_counts(sizes: list[tuple[int, int]], totals: list[int]) -> None:
    """Whatever the way up and down was, grants stand where one charge of the sum would have put them."""
    grants = Grants([grant(f"g-{number}", size, priority) for number, (size, priority) in enumerate(sizes)])
    known: dict[str, int] = left(grants)
    charged = 0
    for total in totals:
        for name, change in grants.move(charged - total, 0).items():
            known[name] += change
        charged = total
    at_once = Grants([grant(f"g-{number}", size, priority) for number, (size, priority) in enumerate(sizes)])
    at_once.move(-charged, 0)
    assert left(grants) == known == left(at_once)
    assert (grants.beyond_us if sizes else charged) == max(charged - sum(size for size, _ in sizes), 0)
