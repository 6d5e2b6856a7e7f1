"""People: registering, profile, password, security code.

What registering tells. A username is public, so a taken one is said. An e-mail address is not: registering
answers the same, after the same work, whether the address is free or taken; when it is taken nothing is made.
Without sending mail that cannot be perfect: whoever registers an address and then cannot log in knows that it
was taken. It costs a registration a guess, and those are counted.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from ulid import ULID

from accounts import audit, logins, security_codes
from accounts.attempts import Guarded, address_key
from accounts.audit import Action, Actor, ActorType
from accounts.context import Accounts
from accounts.errors import Reason, Refused
from accounts.models import User
from accounts.names import email_key, has_login, username_key
from accounts.passwords import weakness

DEFAULT_LANGUAGE = "en"
_CODE_TRIES = 8


@dataclass(frozen=True)
class Profile:
    """A person as they see themselves."""

    user_id: str
    username: str
    email: str
    role: str
    display_name: str
    language: str
    created_at_ms: int


def register(accounts: Accounts, username: str, email: str, password: str, address: str) -> None:
    """Make a user. Returns without having made one when the e-mail address is taken.

    Raises Refused: USERNAME_TAKEN, WEAK_PASSWORD, TOO_MANY_ATTEMPTS.
    """
    now_ms = accounts.now_ms()
    accounts.attempts.count([(Guarded.REGISTER_ADDRESS, address_key(address))], now_ms)
    _require_strong(password, username, email)
    # The same work for every answer.
    password_hash = accounts.passwords.hash(password)
    if _taken(accounts, username, email):
        return
    try:
        with accounts.database.write() as session:
            user = _add_user(session, accounts, username, email, password_hash, "user", now_ms)
            actor = Actor(ActorType.USER, user.user_id)
            audit.record(session, actor, Action.USER_REGISTERED, f"user/{user.user_id}", at_ms=now_ms)
    except IntegrityError:
        # Somebody else took the username or the address meanwhile.
        _taken(accounts, username, email)


def create_operator(
    accounts: Accounts, username: str, email: str, password: str, *, actor: Actor
) -> tuple[str, bool]:
    """Make an operator, or a user of that name and address into one: (user id, whether it is a new user).

    Raises Refused: USERNAME_TAKEN when another person has the username or the address, WEAK_PASSWORD.
    """
    now_ms = accounts.now_ms()
    with accounts.database.write() as session:
        found = session.scalars(
            select(User)
            .where(or_(User.username_key == username_key(username), User.email_key == email_key(email)))
            .with_for_update()
        ).all()
        if found:
            user = found[0]
            if (
                len(found) > 1
                or user.email_key != email_key(email)
                or user.username_key != username_key(username)
            ):
                raise Refused(Reason.USERNAME_TAKEN, "the username or the address is somebody else's")
            user.role, user.updated_at_ms = "operator", now_ms
        else:
            _require_strong(password, username, email)
            password_hash = accounts.passwords.hash(password)
            user = _add_user(session, accounts, username, email, password_hash, "operator", now_ms)
        payload = {"username": user.username}
        audit.record(
            session, actor, Action.OPERATOR_CREATED, f"user/{user.user_id}", at_ms=now_ms, payload=payload
        )
        return user.user_id, not found


def profile(accounts: Accounts, user_id: str) -> Profile:
    """Raises Refused, NOT_FOUND."""
    with accounts.database.read() as session:
        return _profile(_get(session, user_id))


def change_profile(
    accounts: Accounts, user_id: str, *, display_name: str | None, language: str | None
) -> Profile:
    """Change what is given."""
    with accounts.database.write() as session:
        user = _get(session, user_id)
        if display_name is not None:
            user.display_name = display_name
        if language is not None:
            user.language = language
        user.updated_at_ms = accounts.now_ms()
        return _profile(user)


def find(accounts: Accounts, login: str, operator: Actor) -> Profile:
    """The user with that username or address, for an operator; it is in the audit log that they looked.

    Raises Refused, NOT_FOUND.
    """
    with accounts.database.write() as session:
        user = session.scalar(select(User).where(has_login(login)))
        target = f"user/{user.user_id}" if user else "user/"
        audit.record(session, operator, Action.USER_READ, target, at_ms=accounts.now_ms())
        if user is not None:
            return _profile(user)
    raise Refused(Reason.NOT_FOUND, "there is no such user")


def change_password(accounts: Accounts, user_id: str, current: str, new: str, address: str) -> None:
    """Change the password and revoke every log-in.

    The hash that was checked must still be there when the new one is written: of two changes at once one wins.
    Raises Refused: BAD_CREDENTIALS, WEAK_PASSWORD, TOO_MANY_ATTEMPTS.
    """
    now_ms = accounts.now_ms()
    with accounts.database.read() as session:
        user = _get(session, user_id)
        known, names = user.password_hash, (user.username, user.email)
    counted = accounts.attempts.count(
        [
            (Guarded.LOGIN_ACCOUNT_ADDRESS, f"{user_id} {address_key(address)}"),
            (Guarded.LOGIN_ACCOUNT, user_id),
        ],
        now_ms,
    )
    if not accounts.passwords.verify(current, known):
        raise Refused(Reason.BAD_CREDENTIALS, "the current password is not right")
    accounts.attempts.take_back(counted)
    _require_strong(new, *names)
    new_hash = accounts.passwords.hash(new)
    with accounts.database.write() as session:
        user = _get(session, user_id, lock=True)
        if not hmac.compare_digest(user.password_hash, known):
            raise Refused(Reason.BAD_CREDENTIALS, "the password was changed meanwhile")
        user.password_hash, user.updated_at_ms = new_hash, now_ms
        revoked = logins.revoke_all(session, user_id, "password changed", now_ms)
        audit.record(
            session,
            Actor(ActorType.USER, user_id),
            Action.PASSWORD_CHANGED,
            f"user/{user_id}",
            at_ms=now_ms,
            payload={"logins_revoked": revoked},
        )


def security_code(accounts: Accounts, user_id: str) -> str:
    """The user's code, for the user."""
    with accounts.database.read() as session:
        sealed = _get(session, user_id).security_code_sealed
    return accounts.secrets.open(security_codes.SEAL_PURPOSE, sealed, user_id).decode()


def replace_security_code(accounts: Accounts, user_id: str) -> str:
    """A new code. The old one binds nobody from now on; nodes that are bound stay so."""
    now_ms = accounts.now_ms()
    with accounts.database.write() as session:
        user = _get(session, user_id, lock=True)
        code = _give_code(session, accounts, user)
        user.updated_at_ms = now_ms
        actor = Actor(ActorType.USER, user_id)
        audit.record(session, actor, Action.CODE_REPLACED, f"user/{user_id}", at_ms=now_ms)
        return code


def _get(session: Session, user_id: str, *, lock: bool = False) -> User:
    user = session.get(User, user_id, with_for_update=lock)
    if user is None:
        raise Refused(Reason.NOT_FOUND, "there is no such user")
    return user


def _require_strong(password: str, *names: str) -> None:
    why = weakness(password, *names)
    if why is not None:
        raise Refused(Reason.WEAK_PASSWORD, f"the password {why}")


def _taken(accounts: Accounts, username: str, email: str) -> bool:
    """Whether the e-mail address is taken. Raises Refused, USERNAME_TAKEN, when the username is."""
    with accounts.database.read() as session:
        # One question: between two of them somebody could register both.
        names = session.scalars(
            select(User.username_key).where(
                or_(User.username_key == username_key(username), User.email_key == email_key(email))
            )
        ).all()
    if username_key(username) in names:
        raise Refused(Reason.USERNAME_TAKEN, "this username is taken")
    return bool(names)


def _add_user(
    session: Session,
    accounts: Accounts,
    username: str,
    email: str,
    password_hash: str,
    role: str,
    now_ms: int,
) -> User:
    user = User(
        user_id=str(ULID()).lower(),
        username=username,
        username_key=username_key(username),
        email=email,
        email_key=email_key(email),
        password_hash=password_hash,
        role=role,
        display_name=username,
        language=DEFAULT_LANGUAGE,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
    )
    _give_code(session, accounts, user)
    session.add(user)
    session.flush()
    return user


def _give_code(session: Session, accounts: Accounts, user: User) -> str:
    """A code that nobody has. Two that draw the same one at once (2^-40) meet the unique index; one is told
    to repeat.
    """
    for _ in range(_CODE_TRIES):
        code = security_codes.new_code()
        mac = accounts.secrets.mac(security_codes.MAC_PURPOSE, code)
        with session.no_autoflush:
            taken = session.scalar(select(User.user_id).where(User.security_code_mac == mac))
        if not taken:
            user.security_code_mac = mac
            user.security_code_sealed = accounts.secrets.seal(
                security_codes.SEAL_PURPOSE, code.encode(), user.user_id
            )
            return code
    raise RuntimeError("no free security code: the source of random numbers is broken")


def _profile(user: User) -> Profile:
    return Profile(
        user.user_id,
        user.username,
        user.email,
        user.role,
        user.display_name,
        user.language,
        user.created_at_ms,
    )
