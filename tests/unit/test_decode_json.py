"""The strict JSON scanner against the standard library's parser, and where the two differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.strict_json import MAX_BUILT_DEPTH, MAX_INTEGER_DIGITS, NotJson, parse

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *'{}[],:" \t\n\r0123.eE+-',
            '"',
            "\\",
            "\\n",
            "\\u0041",
            "true",
            "false",
            "null",
            '"a"',
            "1",
            "-0",
            "\x0b",
            "é",
        ]
    ),
    max_size=10,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
@settings(max_examples=300, deadline=None)
def test_reads_what_the_standard_library_writes(value: Any, ascii_only: bool, indent: int | None) -> None:
    """Any value comes back, with the types of its numbers."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert repr(parse(text.encode())) == repr(json.loads(text))


@given(FRAGMENTS)
@settings(max_examples=1500, deadline=None)
def test_agrees_on_fragments(fragments: list[str]) -> None:
    """Pieces of JSON in any order are a value to both or to neither."""
    text = "".join(fragments)
    try:
        expected = repr(json.loads(text))
    except ValueError:
        with pytest.raises(NotJson):
            parse(text.encode())
    else:
        # The standard library knows -0 as 0 too; only its constants NaN and Infinity are not in the pieces.
        assert repr(parse(text.encode())) == expected


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", '"\\ud800"', '["\\udc00"]', '{"\\ud800": 1}', "\ufeff1"]
)
def test_stricter_than_the_standard_library(text: str) -> None:
    """Constants that are not JSON, lone surrogates and a BOM are refused."""
    with pytest.raises(NotJson):
        parse(text.encode())


@pytest.mark.parametrize(
    "digits", [MAX_INTEGER_DIGITS - 1, MAX_INTEGER_DIGITS, MAX_INTEGER_DIGITS + 1, 100_000]
)
def test_huge_integers_stay_huge_and_cheap(digits: int) -> None:
    """Up to the limit they are exact; above it they are still larger than any range."""
    positive, negative = parse(b"9" * digits), parse(b"-" + b"9" * digits)
    assert isinstance(positive, int)
    assert isinstance(negative, int)
    assert positive >= 10 ** (MAX_INTEGER_DIGITS - 2)
    assert negative <= -(10 ** (MAX_INTEGER_DIGITS - 2))
    if digits < MAX_INTEGER_DIGITS:
        assert (positive, negative) == (int("9" * digits), -int("9" * digits))


def test_repeated_keys() -> None:
    """The last counts, or none is accepted."""
    assert parse(b'{"a": 1, "b": {"c": 1, "c": 2}, "a": null}') == {"a": None, "b": {"c": 2}}
    with pytest.raises(NotJson, match="'c' is repeated"):
        parse(b'{"a": 1, "b": {"c": 1, "\\u0063": 2}}', unique_keys=True)


def test_nesting_is_limited_by_memory_alone() -> None:
    """A depth that overflows the stack of any recursive parser is read like any other; only what lies where nobody
    looks is left out of the value."""
    value = parse(b"[" * 200_000 + b"1" + b"]" * 200_000)
    depth = 0
    while value:
        assert isinstance(value, list)
        value, depth = value[0], depth + 1
    assert depth == MAX_BUILT_DEPTH - 1
    for closing in (
        b"]" * 199_999,
        b"]" * 200_001,
        b"]" * 199_999 + b"}",
        b"]" * 100_000 + b"1" + b"]" * 100_000,
    ):
        with pytest.raises(NotJson):
            parse(b"[" * 200_000 + b"1" + closing)


def test_what_lies_too_deep_to_be_built_is_read_all_the_same() -> None:
    """Keys, values and brackets beyond the depth are checked, and what comes after them is built again."""
    inside = b'{"a":[1,{"b":{},"a":"\\u0041"},[],[null,{"":-1.5e3}]],"b":2}'
    deep = b"[" * 1_500 + b"%s" + b"]" * 1_500
    document = b'{"deep":%s,"after":[{"x":1}]}'
    value = parse(document % (deep % inside))
    assert isinstance(value, dict)
    assert value["after"] == [{"x": 1}]
    for old, new in (
        (b"{}", b"{,}"),
        (b'"b":2', b'"b"2'),
        (b"[],", b"[]"),
        (b"null", b"nil"),
        (b"1,", b'1,"k":'),
    ):
        with pytest.raises(NotJson):
            parse(document % (deep % inside.replace(old, new, 1)))
