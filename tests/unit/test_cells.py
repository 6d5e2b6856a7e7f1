"""Cells: windows at their edges, shares that sum to the cost, vectors that sum to zero."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from metering.cells import cell_id, cell_vector, scope_ids, split_equally, window_start_ms

users = st.sets(st.text("abcdef0123456789-", min_size=1, max_size=6), min_size=1, max_size=9)
amounts = st.integers(0, 10**12)


def test_a_window_holds_its_start_and_not_its_end() -> None:
    """Just inside, exactly at, just past; and before 1970."""
    assert window_start_ms(1_767_225_600_000) == 1_767_225_600_000
    assert window_start_ms(1_767_225_659_999) == 1_767_225_600_000
    assert window_start_ms(1_767_225_660_000) == 1_767_225_660_000
    assert window_start_ms(-1) == -60_000


@given(amounts, users)
def test_shares_sum_to_the_cost_and_differ_by_one_at_most(total_us: int, payers: set[str]) -> None:
    """Nothing is lost in the division, whoever pays."""
    owed = split_equally("room/r-1@0", total_us, payers)
    assert sum(owed.values()) == total_us
    assert max(owed.values()) - min(owed.values()) <= 1


@given(amounts, users)
def test_what_is_left_over_goes_to_the_first_hashes(total_us: int, payers: set[str]) -> None:
    """The payers of one microsecond more are those whose hex digest sorts first."""
    cell = cell_id("room/r-1", 60_000)
    owed = split_equally(cell, total_us, payers)
    ranked = sorted(payers, key=lambda user: sha256(f"{cell}|{user}".encode()).hexdigest())
    share, left_over = divmod(total_us, len(payers))
    assert [owed[user] for user in ranked] == [share + 1] * left_over + [share] * (len(payers) - left_over)


@given(
    st.dictionaries(st.sampled_from("uvwx"), amounts, min_size=1),
    st.dictionaries(st.sampled_from("mn"), amounts),
    users,
)
def test_every_cell_sums_to_zero(costs: dict[str, int], credits: dict[str, int], members: set[str]) -> None:
    """Debits of payers are credits of nodes and the platform, in rooms and sessions."""
    for scope in ("room/r-1", "session/s-1"):
        assert sum(cell_vector(scope, 0, costs, credits, members).values()) == 0


def test_a_room_charges_members_and_speakers_alike() -> None:
    """Payers are those present together with those who have usage; the node earns; revenue is the rest."""
    vector = cell_vector("room/r-1", 0, {"u-1": 90}, {"n-1": 40}, {"u-2", "u-3"})
    assert vector == {
        "user/u-1": -30,
        "user/u-2": -30,
        "user/u-3": -30,
        "node/n-1": 40,
        "platform/revenue": 50,
    }


def test_a_session_charges_each_user_for_their_own() -> None:
    """Members of no room matter; zeros are part of the vector."""
    vector = cell_vector("session/s-1", 0, {"u-1": 90, "u-2": 0}, {"n-1": 0}, {"u-9"})
    assert vector == {"user/u-1": -90, "user/u-2": 0, "node/n-1": 0, "platform/revenue": 90}


def test_a_scope_names_its_room_or_session() -> None:
    """The other one is empty."""
    assert scope_ids("room/a:b") == ("", "a:b")
    assert scope_ids("session/a.b") == ("a.b", "")
