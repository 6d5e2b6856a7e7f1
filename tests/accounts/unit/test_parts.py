"""Codes, passwords, secrets, amounts, cursors, addresses: what needs no database."""

from __future__ import annotations

import stat
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from accounts.api.wire import PositiveMinutes, SignedMinutes, amount_us, cursor_of, place_of
from accounts.attempts import address_key
from accounts.errors import Refused
from accounts.gateway import minutes_text
from accounts.passwords import Argon2Parameters, Passwords, weakness
from accounts.secrets import Secrets, secret_in_file
from accounts.security_codes import ALPHABET, LENGTH, canonical, new_code
from metering.money import US_PER_MINUTE
from tests.accounts.support import CHEAP, SECRET, at_once


def test_the_alphabet_has_no_look_alikes() -> None:
    """31 different characters, none of which is mistaken for another."""
    assert len(set(ALPHABET)) == len(ALPHABET) == 31
    assert not set(ALPHABET) & set("0O1IL")


def test_codes_use_the_whole_alphabet_and_do_not_repeat() -> None:
    """A thousand codes."""
    codes = {new_code() for _ in range(1_000)}
    assert len(codes) == 1_000
    assert all(len(code) == LENGTH for code in codes)
    assert set("".join(codes)) == set(ALPHABET)


@pytest.mark.parametrize("entered", ["K7QM4XTB", "k7qm-4xtb", " K7QM 4XTB ", "K7QM–4XTB", "Ｋ７ＱＭ４ＸＴＢ"])
def test_a_code_is_recognised_as_people_write_it(entered: str) -> None:
    """Case, spaces, dashes and full-width letters do not matter."""
    assert canonical(entered) == "K7QM4XTB"


@pytest.mark.parametrize("entered", ["", "K7QM4XT", "K7QM4XTBB", "K7QM4XT0", "K7QM4XTI", "K7QM4XTé"])
def test_what_can_be_no_code(entered: str) -> None:
    """Too short, too long, another character."""
    assert canonical(entered) is None


def test_passwords() -> None:
    """argon2id; the right one verifies, another and nobody's do not; equal passwords have unequal hashes."""
    passwords = Passwords(CHEAP)
    hashed = passwords.hash("Ångström-1234")
    assert hashed.startswith("$argon2id$")
    assert hashed != passwords.hash("Ångström-1234")
    # The same letters, composed in another way.
    assert passwords.verify("Ångström-1234", hashed)
    assert not passwords.verify("Angstrom-1234", hashed)
    assert not passwords.verify("nobody has this password", None)
    assert not passwords.outdated(hashed)
    assert Passwords(Argon2Parameters(2, 8, 1)).outdated(hashed)
    assert not passwords.verify("x", "no hash at all")


@pytest.mark.parametrize(
    ("password", "why"),
    [
        ("123456789", "10 to 128"),
        ("x" * 129, "10 to 128"),
        ("abcabcabcabc", "4 different"),
        ("ADA.Lovelace", "username"),
        ("1234567890", None),
        ("abcd" * 32, None),
    ],
)
def test_weakness(password: str, why: str | None) -> None:
    """At the edges of what is taken."""
    found = weakness(password, "ada.lovelace")
    assert (found is None) == (why is None)
    assert why is None or why in str(found)


def test_sealed_is_opened_by_its_owner_only() -> None:
    """Neither another owner, purpose or secret opens it, nor a changed byte."""
    secrets = Secrets(SECRET)
    sealed = secrets.seal("code", b"K7QM4XTB", "user-1")
    assert sealed != secrets.seal("code", b"K7QM4XTB", "user-1")
    assert secrets.open("code", sealed, "user-1") == b"K7QM4XTB"
    changed = ("B" if sealed[20] == "A" else "A").join((sealed[:20], sealed[21:]))
    for holder, purpose, text, owner in (
        (secrets, "code", sealed, "user-2"),
        (secrets, "key", sealed, "user-1"),
        (Secrets(SECRET + "!"), "code", sealed, "user-1"),
        (secrets, "code", changed, "user-1"),
    ):
        with pytest.raises(ValueError, match="does not open"):
            holder.open(purpose, text, owner)


def test_macs_differ_by_purpose_and_secret() -> None:
    """And are the same for the same."""
    secrets, other = Secrets(SECRET), Secrets(SECRET + "!")
    assert secrets.mac("a", "x") == Secrets(SECRET).mac("a", "x")
    assert (
        len({secrets.mac("a", "x"), secrets.mac("b", "x"), secrets.mac("a", "y"), other.mac("a", "x")}) == 4
    )
    assert secrets.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="32"):
        Secrets("x" * 31)


def test_the_secret_file_is_made_once(tmp_path: Path) -> None:
    """Also by many at once; only its owner reads it."""
    file = tmp_path / "state" / "accounts.secret"
    found = set(at_once(8, lambda _: secret_in_file(file)))
    assert len(found) == 1 and len(found.pop()) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@given(st.integers(-(10**17), 10**17))
def test_minutes_as_text_are_exact_to_the_9th_place(amount: int) -> None:
    """Two amounts that differ have texts that differ, and the text is within half of its last place."""
    text = minutes_text(amount)
    assert "E" not in text and text != "-0"
    assert round(Decimal(text) * US_PER_MINUTE) == amount
    assert abs(Decimal(text) * US_PER_MINUTE - amount) <= Decimal("0.03")


@given(st.from_regex(r"\A-?[0-9]{1,7}(\.[0-9]{1,7})?\Z"))
def test_amounts_that_are_taken_are_whole_microseconds(text: str) -> None:
    """Nothing is rounded."""
    assert amount_us(text) == Decimal(text) * US_PER_MINUTE


@pytest.mark.parametrize(
    "text", ["0", "0.0", "-0", "-1", "1.12345678", "12345678", "1e3", ".5", "5.", " 1", "+1", "١"]
)
def test_amounts_that_are_not_taken(text: str) -> None:
    """Nothing, less than nothing, too fine, too large, or no plain decimal."""
    with pytest.raises(ValidationError):
        TypeAdapter(PositiveMinutes).validate_python(text)
    if text != "-1":
        with pytest.raises(ValidationError):
            TypeAdapter(SignedMinutes).validate_python(text)


@given(st.integers(-(2**61), 2**61), st.from_regex(r"\A[A-Za-z0-9._:-]{1,128}\Z"))
def test_cursors_come_back(number: int, name: str) -> None:
    """What was put in."""
    assert place_of(cursor_of(number, name), int, str) == (number, name)
    with pytest.raises(Refused):
        place_of(cursor_of(number, name), int)


@given(st.text(alphabet="ABCabc0189_-", max_size=40))
def test_no_cursor_breaks_anything(cursor: str) -> None:
    """It is refused, or is one."""
    try:
        place = place_of(cursor, int, str)
    except Refused:
        return
    assert place is not None and len(place) == 2


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_stands_for_whoever_has_it(address: str, key: str) -> None:
    """A network of IPv6 is one customer; an IPv4 address in the clothes of IPv6 is itself."""
    assert address_key(address) == key
