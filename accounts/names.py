"""When two usernames, or two e-mail addresses, are the same."""

from __future__ import annotations

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from accounts.models import User


def username_key(username: str) -> str:
    """Two usernames with one key are the same."""
    return username.casefold()


def email_key(email: str) -> str:
    """Two addresses with one key are the same."""
    return email.casefold()


def has_login(login: str) -> ColumnElement[bool]:
    """The condition that a user has that username or, when there is an @ in it, e-mail address."""
    return User.email_key == email_key(login) if "@" in login else User.username_key == username_key(login)


def by_login(session: Session, login: str) -> User | None:
    """The user with that username or e-mail address."""
    return session.scalar(select(User).where(has_login(login)))
