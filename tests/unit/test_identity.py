"""Identity and body: what makes two occurrences one event, and what makes them a conflict."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.identity import body_digest, identity_digest, partition_and_offset, position
from schemas.events import LifecycleKind, Usage
from tests.support.events import membership, usage

NOT_BODY = {"scope", "source", "id"}


@pytest.mark.parametrize("name", [name for name in Usage.__struct_fields__ if name not in NOT_BODY])
def test_every_field_of_usage_is_part_of_its_body(name: str) -> None:
    """A repeat that differs in any of them says something else."""
    event = usage("e-1")
    value = getattr(event, name)
    changed = value + 1 if isinstance(value, int) else f"{value}x"
    assert body_digest(msgspec.structs.replace(event, **{name: changed})) != body_digest(event)
    assert body_digest(msgspec.structs.replace(event, source="node/n-2", id="e-2")) == body_digest(event)


def test_absent_is_not_the_same_as_a_text_that_looks_like_it() -> None:
    """No language and a language called None differ."""
    event = usage("e-1")
    none = msgspec.structs.replace(event, source_lang=None)
    text = msgspec.structs.replace(event, source_lang="None")
    assert body_digest(none) != body_digest(text)


def test_kinds_users_and_times_of_membership_are_its_body() -> None:
    """A join is not a leave, and not somebody else's join, and not a later one."""
    joined = membership("e-1", LifecycleKind.JOINED, 5)
    others = [
        membership("e-1", LifecycleKind.LEFT, 5),
        membership("e-1", LifecycleKind.JOINED, 6),
        membership("e-1", LifecycleKind.JOINED, 5, user="u-2"),
        membership("e-1", LifecycleKind.CLOSED, 5),
    ]
    assert len({body_digest(event) for event in [joined, *others]}) == 5


def test_source_and_id_cannot_lend_each_other_characters() -> None:
    """("ab", "c") is not ("a", "bc"), also with digits and colons in them."""
    pairs = [("ab", "c"), ("a", "bc"), ("1:a", "b"), ("1", ":ab"), ("", "abc"), ("11", "x"), ("1", "1x")]
    assert len({identity_digest(*pair) for pair in pairs}) == len(pairs)


@given(st.integers(0, 2**15), st.integers(0, 2**48 - 1), st.integers(0, 2**15), st.integers(0, 2**48 - 1))
def test_positions_sort_as_partition_then_offset(a: int, b: int, c: int, d: int) -> None:
    """Packed into one integer and back."""
    assert (position(a, b) < position(c, d)) == ((a, b) < (c, d))
    assert partition_and_offset(position(a, b)) == (a, b)
