"""Logging in, refreshing, logging out.

Laws:
- A refresh token is 256 random bits, kept as their SHA-256. It works once: using it gives the next one.
- A token that is used a second time tells that two have it. Then the whole log-in is revoked, whoever came
  first; who asked too late, or lost an answer, has to give the password again.
- The row of the log-in is locked before its tokens are looked at, so that of two uses at once exactly one
  succeeds, and the other one is a second use.
- A new log-in is written only while the password that was checked is still the user's, with the user's row
  locked: a change of the password revokes every log-in, also those that were on their way.

A crash between the commit of a refresh and its answer loses the new token: the caller's next try is a second
use, and they log in again. The other order would give away tokens that were never written.
"""

from __future__ import annotations

import hmac
import secrets as random
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.orm import Session
from ulid import ULID

from accounts import audit
from accounts.attempts import Guarded, address_key
from accounts.audit import Action, Actor, ActorType
from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.models import Login, RefreshToken, User
from accounts.names import by_login
from accounts.tokens import Claims, SubjectKind

TOKEN_PREFIX = "lmr_"
"""Lets a leak scanner know one when it sees it."""


@dataclass(frozen=True)
class Tokens:
    """What a client holds after logging in."""

    access_token: str
    refresh_token: str
    expires_in_s: int


@dataclass(frozen=True)
class Person:
    """Who a valid access token of a user speaks for, as of now."""

    user_id: str
    role: str
    login_id: str

    @property
    def actor(self) -> Actor:
        """As the audit log names them."""
        return Actor(ActorType.OPERATOR if self.role == "operator" else ActorType.USER, self.user_id)


@dataclass(frozen=True)
class LoginShown:
    """A living log-in, for its owner."""

    login_id: str
    created_at_ms: int
    refreshed_at_ms: int
    expires_at_ms: int


def log_in(accounts: Accounts, login: str, password: str, address: str) -> Tokens:
    """Raises Refused: BAD_CREDENTIALS, the same for an unknown user and a wrong password; TOO_MANY_ATTEMPTS."""
    now_ms = accounts.now_ms()
    where = address_key(address)
    # Counted under what was entered: an unknown name is counted, and refused, like a known one.
    who = login.casefold()
    counted = accounts.attempts.count(
        [
            (Guarded.LOGIN_ACCOUNT_ADDRESS, f"{who} {where}"),
            (Guarded.LOGIN_ACCOUNT, who),
            (Guarded.LOGIN_ADDRESS, where),
        ],
        now_ms,
    )
    with accounts.database.read() as session:
        user = by_login(session, login)
        known = None if user is None else user.password_hash
        user_id = "" if user is None else user.user_id
    if not accounts.passwords.verify(password, known) or known is None:
        raise _bad_credentials()
    accounts.attempts.take_back(counted)
    new_hash = accounts.passwords.hash(password) if accounts.passwords.outdated(known) else known
    with accounts.database.write() as session:
        user = session.get(User, user_id, with_for_update=True)
        if user is None or not hmac.compare_digest(user.password_hash, known):
            raise _bad_credentials()
        user.password_hash = new_hash
        session.execute(delete(Login).where(Login.user_id == user_id, Login.expires_at_ms <= now_ms))
        made = Login(
            login_id=str(ULID()).lower(),
            user_id=user_id,
            created_at_ms=now_ms,
            refreshed_at_ms=now_ms,
            expires_at_ms=now_ms + accounts.config.refresh_token_s * 1000,
        )
        session.add(made)
        session.flush()
        refresh_token = _add_token(session, made)
        login_id, role = made.login_id, user.role
    return _tokens(accounts, user_id, role, login_id, refresh_token, now_ms)


def refresh(accounts: Accounts, token: str, address: str) -> Tokens:
    """New tokens for a refresh token that was not used yet.

    Raises Refused: BAD_TOKEN for one that is unknown, expired or revoked; REFRESH_REUSED, after revoking the
    log-in.
    """
    now_ms = accounts.now_ms()
    counted = accounts.attempts.count([(Guarded.REFRESH_ADDRESS, address_key(address))], now_ms)
    token_hash = _hash(token)
    reused = False
    with accounts.database.write() as session:
        login_id = session.scalar(select(RefreshToken.login_id).where(RefreshToken.token_hash == token_hash))
        login = session.get(Login, login_id, with_for_update=True) if login_id else None
        # Read only now that nobody else can be changing it.
        row = session.get(RefreshToken, token_hash)
        if login is None or row is None or login.revoked_at_ms is not None or login.expires_at_ms <= now_ms:
            raise Refused(Reason.BAD_TOKEN, "the refresh token is not valid")
        if row.used_at_ms is not None:
            reused = True
            login.revoked_at_ms, login.revoked_because = now_ms, "refresh token reused"
            audit.record(
                session,
                Actor(ActorType.SYSTEM, "accounts"),
                Action.REFRESH_REUSED,
                f"user/{login.user_id}",
                at_ms=now_ms,
                payload={"login_id": login.login_id},
            )
        elif row.expires_at_ms <= now_ms:
            raise Refused(Reason.BAD_TOKEN, "the refresh token is not valid")
        else:
            row.used_at_ms = now_ms
            login.refreshed_at_ms = now_ms
            latest_ms = login.created_at_ms + accounts.config.login_max_s * 1000
            login.expires_at_ms = min(now_ms + accounts.config.refresh_token_s * 1000, latest_ms)
            session.execute(
                delete(RefreshToken).where(
                    RefreshToken.login_id == login.login_id, RefreshToken.expires_at_ms <= now_ms
                )
            )
            next_token = _add_token(session, login)
            user_id, this_login = login.user_id, login.login_id
            role = session.get_one(User, user_id).role
    # Raised only here: inside, it would undo the revocation.
    if reused:
        raise Refused(
            Reason.REFRESH_REUSED, "the refresh token was used before; this log-in is revoked, log in again"
        )
    accounts.attempts.take_back(counted)
    return _tokens(accounts, user_id, role, this_login, next_token, now_ms)


def log_out(accounts: Accounts, token: str) -> None:
    """Revoke the log-in of this refresh token, used or not. An unknown one changes nothing and is not told
    apart.
    """
    now_ms = accounts.now_ms()
    with accounts.database.write() as session:
        login_id = session.scalar(
            select(RefreshToken.login_id).where(RefreshToken.token_hash == _hash(token))
        )
        if login_id is not None:
            session.execute(
                update(Login)
                .where(Login.login_id == login_id, Login.revoked_at_ms.is_(None))
                .values(revoked_at_ms=now_ms, revoked_because="logged out")
            )


def log_out_everywhere(accounts: Accounts, user_id: str) -> None:
    """Revoke every log-in of a user."""
    now_ms = accounts.now_ms()
    with accounts.database.write() as session:
        session.get(User, user_id, with_for_update=True)
        revoked = revoke_all(session, user_id, "logged out everywhere", now_ms)
        audit.record(
            session,
            Actor(ActorType.USER, user_id),
            Action.LOGINS_REVOKED,
            f"user/{user_id}",
            at_ms=now_ms,
            payload={"logins_revoked": revoked},
        )


def revoke_all(session: Session, user_id: str, because: str, now_ms: int) -> int:
    """Revoke every living log-in of a user, in this transaction, which holds the user's row; how many."""
    done = session.execute(
        update(Login)
        .where(Login.user_id == user_id, Login.revoked_at_ms.is_(None), Login.expires_at_ms > now_ms)
        .values(revoked_at_ms=now_ms, revoked_because=because)
    )
    assert isinstance(done, CursorResult)
    return done.rowcount


def living(accounts: Accounts, user_id: str) -> list[LoginShown]:
    """The user's log-ins that are neither revoked nor expired, the newest first."""
    with accounts.database.read() as session:
        rows = session.scalars(
            select(Login)
            .where(
                Login.user_id == user_id,
                Login.revoked_at_ms.is_(None),
                Login.expires_at_ms > accounts.now_ms(),
            )
            .order_by(Login.login_id.desc())
        )
        return [
            LoginShown(row.login_id, row.created_at_ms, row.refreshed_at_ms, row.expires_at_ms)
            for row in rows
        ]


def person(accounts: Accounts, claims: Claims) -> Person:
    """Who this token speaks for. Raises Refused, BAD_TOKEN, when its log-in is over."""
    if claims.kind is not SubjectKind.USER:
        raise Refused(Reason.FORBIDDEN, "this is for users; the token is a node's")
    with accounts.database.read() as session:
        found = session.execute(
            select(Login.revoked_at_ms, Login.expires_at_ms, User.role)
            .join(User, User.user_id == Login.user_id)
            .where(Login.login_id == claims.session, Login.user_id == claims.subject_id)
        ).one_or_none()
    if found is None or found.revoked_at_ms is not None or found.expires_at_ms <= accounts.now_ms():
        raise Refused(Reason.BAD_TOKEN, "this log-in is over")
    return Person(claims.subject_id, found.role, claims.session)


def _add_token(session: Session, login: Login) -> str:
    token = TOKEN_PREFIX + random.token_urlsafe(32)
    session.add(
        RefreshToken(
            token_hash=_hash(token),
            login_id=login.login_id,
            issued_at_ms=login.refreshed_at_ms,
            expires_at_ms=login.expires_at_ms,
        )
    )
    return token


def _tokens(
    accounts: Accounts, user_id: str, role: str, login_id: str, refresh_token: str, now_ms: int
) -> Tokens:
    access = accounts.tokens.issue(SubjectKind.USER, user_id, role, login_id, now_ms)
    return Tokens(access, refresh_token, accounts.config.access_token_s)


def _hash(token: str) -> str:
    # 256 random bits need no salt and no slow hash.
    return sha256(token.encode()).hexdigest()


def _bad_credentials() -> Refused:
    return Refused(Reason.BAD_CREDENTIALS, "the login or the password is not right")
