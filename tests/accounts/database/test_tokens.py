"""Access tokens: rotation of keys, and what is no token of ours."""

from __future__ import annotations

import base64
import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.models import SigningKey
from accounts.tokens import CACHE_MS, AccessTokens, SubjectKind
from tests.accounts.support import ROOT, Clock, at_once


def issue(tokens: AccessTokens, clock: Clock) -> str:
    return tokens.issue(SubjectKind.USER, "u-5", "user", "login", clock())


def works(tokens: AccessTokens, token: str, clock: Clock) -> bool:
    try:
        return tokens.verify(token, clock()).subject_id == "u-5"
    except Refused as refused:
        assert refused.reason is Reason.BAD_TOKEN
        return False


def kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def published(tokens: AccessTokens, clock: Clock) -> set[str]:
    return {key["kid"] for key in tokens.jwks(clock())["keys"]}


def test_a_rotated_key_verifies_until_what_it_signed_has_expired(accounts: Accounts, clock: Clock) -> None:
    """The new one signs at once; the old one is published as long as a token of it may live, and no longer."""
    tokens = accounts.tokens
    old = issue(tokens, clock)
    new_kid = tokens.rotate(ROOT, clock())
    new = issue(tokens, clock)
    assert kid(new) == new_kid != kid(old)
    assert published(tokens, clock) == {kid(old), new_kid}
    clock.go_on(599)
    assert works(tokens, old, clock) and works(tokens, new, clock)
    clock.go_on(1 + CACHE_MS / 1000)
    assert not works(tokens, old, clock)
    assert published(tokens, clock) == {new_kid}


def test_another_process_that_still_signs_with_the_old_key_is_believed(
    accounts: Accounts, clock: Clock
) -> None:
    """Its cache is a few seconds old; what it signs then lives as long as any token."""
    other = AccessTokens(accounts.database, accounts.secrets, 600)
    issue(other, clock)
    accounts.tokens.rotate(ROOT, clock())
    clock.go_on(CACHE_MS / 1000 - 0.001)
    late = issue(other, clock)
    clock.go_on(0.001)
    assert kid(issue(other, clock)) != kid(late)
    clock.go_on(598)
    assert works(accounts.tokens, late, clock) and works(other, late, clock)


def test_a_key_that_another_process_made_is_found(accounts: Accounts, clock: Clock) -> None:
    """A token of a key that is not in the cache makes it look again."""
    other = AccessTokens(accounts.database, accounts.secrets, 600)
    issue(other, clock)
    accounts.tokens.rotate(ROOT, clock())
    assert works(other, issue(accounts.tokens, clock), clock)


def test_rotation_at_once_ends_what_was_signed(accounts: Accounts, clock: Clock) -> None:
    """For a key that leaked."""
    old = issue(accounts.tokens, clock)
    accounts.tokens.rotate(ROOT, clock(), at_once=True)
    assert not works(accounts.tokens, old, clock)
    assert works(accounts.tokens, issue(accounts.tokens, clock), clock)


def test_a_leaked_key_that_was_retired_before_ends_too(accounts: Accounts, clock: Clock) -> None:
    """A usual rotation came first."""
    old = issue(accounts.tokens, clock)
    accounts.tokens.rotate(ROOT, clock())
    accounts.tokens.rotate(ROOT, clock(), at_once=True)
    assert not works(accounts.tokens, old, clock)


def test_the_first_key_is_made_once(accounts: Accounts, clock: Clock) -> None:
    """However many processes start at once."""
    processes = [AccessTokens(accounts.database, accounts.secrets, 600) for _ in range(6)]
    tokens = at_once(6, lambda number: issue(processes[number], clock))
    assert len({kid(token) for token in tokens}) == 1


def test_private_keys_lie_sealed(accounts: Accounts, clock: Clock) -> None:
    """Nothing in the row opens without the secret, nor in another row."""
    issue(accounts.tokens, clock)
    with accounts.database.read() as session:
        row = session.scalars(select(SigningKey)).one()
    with pytest.raises(ValueError, match="does not open"):
        accounts.secrets.open("signing key", row.private_key_sealed, "another kid")
    assert accounts.secrets.open("signing key", row.private_key_sealed, row.kid)


def test_what_is_no_token_of_ours(accounts: Accounts, clock: Clock) -> None:
    """Another key under our key id, no signature, another algorithm, changed claims, another audience, none."""
    good = issue(accounts.tokens, clock)
    head, body, signature = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    headers = {"kid": kid(good)}
    stranger = Ed25519PrivateKey.generate()
    public = accounts.tokens.jwks(clock())["keys"][0]["x"]

    def encoded(document: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()

    assert works(accounts.tokens, good, clock)
    for bad in (
        jwt.encode(claims, stranger, "EdDSA", headers=headers),
        jwt.encode(claims, stranger, "EdDSA", headers={"kid": "0" * 16}),
        jwt.encode(claims, stranger, "EdDSA"),
        f"{encoded({'alg': 'none', 'kid': kid(good)})}.{body}.",
        jwt.encode(claims, public * 2, "HS256", headers=headers),
        f"{head}.{encoded(claims | {'role': 'operator'})}.{signature}",
        f"{head}.{body}",
        "",
        "é.é.é",
    ):
        assert not works(accounts.tokens, bad, clock), bad
    key = accounts.tokens._signing_key(clock()).private
    for wrong in ({"aud": "other"}, {"iss": "other"}, {"sub": "room/r"}, {"exp": None}, {"exp": "soon"}):
        assert not works(accounts.tokens, jwt.encode(claims | wrong, key, "EdDSA", headers=headers), clock), (
            wrong
        )
