"""The tables. Instants are milliseconds since the Unix epoch (`_ms`), so that both databases keep the same.

`migrations/` makes them; a test holds the two equal. Text that identifies is compared byte by byte, so
whatever people may write in several ways (a username, an e-mail address) has a second column with its one
canonical form.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
"""Both databases name constraints alike, so that a migration can drop what another one made."""

Number = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts rows by INTEGER only."""


class Base(DeclarativeBase):
    """Of every table here."""

    metadata = MetaData(naming_convention=NAMING)


class Meta(Base):
    """Facts about the database itself, by name."""

    __tablename__ = "meta"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class User(Base):
    """A person. The balance is not here: Redis has it, under `user/<user_id>`."""

    __tablename__ = "users"
    __table_args__ = (CheckConstraint("role IN ('user', 'operator')", name="role"),)

    user_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    username: Mapped[str] = mapped_column(String(32))
    username_key: Mapped[str] = mapped_column(String(32), unique=True)
    email: Mapped[str] = mapped_column(String(254))
    email_key: Mapped[str] = mapped_column(String(254), unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))
    role: Mapped[str] = mapped_column(String(16))
    display_name: Mapped[str] = mapped_column(String(64))
    language: Mapped[str] = mapped_column(String(35))
    security_code_mac: Mapped[str] = mapped_column(String(64), unique=True)
    security_code_sealed: Mapped[str] = mapped_column(String(128))
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    updated_at_ms: Mapped[int] = mapped_column(BigInteger)


class Login(Base):
    """One log-in, the family of its refresh tokens. Once revoked it never lives again."""

    __tablename__ = "logins"

    login_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"), index=True)
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    refreshed_at_ms: Mapped[int] = mapped_column(BigInteger)
    expires_at_ms: Mapped[int] = mapped_column(BigInteger, index=True)
    revoked_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    revoked_because: Mapped[str | None] = mapped_column(String(32))


class RefreshToken(Base):
    """A refresh token by its hash. A used one is kept until it would have expired: its second use tells of a
    thief.
    """

    __tablename__ = "refresh_tokens"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    login_id: Mapped[str] = mapped_column(ForeignKey("logins.login_id", ondelete="CASCADE"), index=True)
    issued_at_ms: Mapped[int] = mapped_column(BigInteger)
    expires_at_ms: Mapped[int] = mapped_column(BigInteger)
    used_at_ms: Mapped[int | None] = mapped_column(BigInteger)


class SigningKey(Base):
    """A key pair of access tokens. It signs until `retired_at_ms`, and verifies until `expires_at_ms`."""

    __tablename__ = "signing_keys"

    kid: Mapped[str] = mapped_column(String(32), primary_key=True)
    public_key: Mapped[str] = mapped_column(String(64))
    private_key_sealed: Mapped[str] = mapped_column(String(255))
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    retired_at_ms: Mapped[int | None] = mapped_column(BigInteger)
    expires_at_ms: Mapped[int | None] = mapped_column(BigInteger)


class Node(Base):
    """A compute node. Its credit is in Redis, under `node/<node_id>`."""

    __tablename__ = "nodes"

    node_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.user_id"), index=True)
    secret_hash: Mapped[str] = mapped_column(String(64))
    created_at_ms: Mapped[int] = mapped_column(BigInteger)
    updated_at_ms: Mapped[int] = mapped_column(BigInteger)


class Binding(Base):
    """A node bound to a user. Of a user's nodes the one with the smallest position pays first."""

    __tablename__ = "bindings"
    __table_args__ = (UniqueConstraint("user_id", "position"),)

    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.node_id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    bound_at_ms: Mapped[int] = mapped_column(BigInteger)


class MoneyRequest(Base):
    """A money command that was asked for here, under its request id. What came of it is not here: Redis and
    ClickHouse have the one result that counts.
    """

    __tablename__ = "money_requests"

    request_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    account: Mapped[str] = mapped_column(String(133))
    amount_us: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str] = mapped_column(String(256))
    actor: Mapped[str] = mapped_column(String(256))
    node_account: Mapped[str | None] = mapped_column(String(133))
    digest: Mapped[str] = mapped_column(String(64))
    created_at_ms: Mapped[int] = mapped_column(BigInteger)


class AuditEntry(Base):
    """A privileged act. Triggers refuse every change and removal of a row."""

    __tablename__ = "audit_log"
    __table_args__ = (
        # NULLs are distinct in both databases: acts without a request id are never the same act.
        UniqueConstraint("action", "request_id"),
        Index(None, "target"),
        Index(None, "actor_id"),
        {"sqlite_autoincrement": True},
    )

    audit_id: Mapped[int] = mapped_column(Number, Identity(), primary_key=True)
    actor_type: Mapped[str] = mapped_column(String(16))
    actor_id: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(256))
    request_id: Mapped[str | None] = mapped_column(String(128))
    payload: Mapped[str] = mapped_column(Text)
    at_ms: Mapped[int] = mapped_column(BigInteger)


class Attempts(Base):
    """How often something was tried under one key in one window; the key is a MAC and names nobody."""

    __tablename__ = "attempts"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    window_start_ms: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    count: Mapped[int] = mapped_column(Integer)
    expires_at_ms: Mapped[int] = mapped_column(BigInteger, index=True)


class WriteOffPeriod(Base):
    """A period whose write-offs are planned: its transfers were written down with it."""

    __tablename__ = "write_off_periods"

    period_ms: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    planned_at_ms: Mapped[int] = mapped_column(BigInteger)


class WriteOffTransfer(Base):
    """What a node is to pay for a user, at most; and once it is closed, what it paid."""

    __tablename__ = "write_off_transfers"
    __table_args__ = (UniqueConstraint("period_ms", "user_id", "node_id"),)

    period_ms: Mapped[int] = mapped_column(ForeignKey("write_off_periods.period_ms"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    user_id: Mapped[str] = mapped_column(String(128))
    node_id: Mapped[str] = mapped_column(String(128))
    amount_us: Mapped[int] = mapped_column(BigInteger)
    closed_at_ms: Mapped[int | None] = mapped_column(BigInteger, index=True)
    outcome: Mapped[str | None] = mapped_column(String(16))
    moved_us: Mapped[int | None] = mapped_column(BigInteger)


class Subscription(Base):
    """A user's plan, and the start of the last period of it that was given."""

    __tablename__ = "subscriptions"

    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    plan: Mapped[str] = mapped_column(String(32), primary_key=True)
    issued_period_ms: Mapped[int] = mapped_column(BigInteger)
    subscribed_at_ms: Mapped[int] = mapped_column(BigInteger)
