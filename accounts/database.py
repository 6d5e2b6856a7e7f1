"""The database of accounts: SQLite in a file, or PostgreSQL through a pool.

Laws:
- Every unit of work is one transaction: `read` sees one state, `write` is all or nothing and committed when
  its block ends without an error.
- A writer on SQLite begins with BEGIN IMMEDIATE: it waits for its turn (busy_timeout) at the start, and
  cannot fail in the middle because somebody else wrote. On PostgreSQL rows that a decision rests on are
  locked (FOR UPDATE).
- What is committed is on disk: SQLite runs with synchronous=FULL.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, literal, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from accounts.models import Base

BUSY_TIMEOUT_S = 5.0
"""How long a writer waits for its turn; then the caller is told to come again."""
POOL_RECYCLE_S = 1_800
_SNAPSHOT = "REPEATABLE READ"


class Database:
    """Opens nothing until the first use; safe to share between threads."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        """`url`: sqlite:///FILE or postgresql://..."""
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.path = Path(parsed.database or "")
            self.engine = create_engine(
                parsed,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT_S,
                connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S},
            )
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_timeout=BUSY_TIMEOUT_S,
                pool_recycle=POOL_RECYCLE_S,
                # A server that was restarted is noticed before a request meets a dead connection.
                pool_pre_ping=True,
                connect_args={
                    "connect_timeout": 5,
                    "options": "-c lock_timeout=5000 -c statement_timeout=15000 "
                    "-c idle_in_transaction_session_timeout=30000",
                },
            )
        self._writer = self.engine.execution_options(writer=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing."""
        with Session(self.engine, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed when the block ends without an error, else rolled back."""
        with Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """One consistent view of everything, for as long as the block takes; writers go on meanwhile."""
        engine = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level=_SNAPSHOT)
        with engine.connect() as connection:
            # A long backup is no idle transaction and no slow statement.
            if not self.is_sqlite:
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield connection

    def close(self) -> None:
        """Close every connection of the pool."""
        self.engine.dispose()


def sqlite_url(file: Path) -> str:
    """The URL of a database in a file; its directory is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}"


def lock_for(session: Session, what: str) -> None:
    """One transaction at a time may do this; the others wait. SQLite's writers take turns anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(what.encode())})


def insert_if_absent(session: Session, model: type[Base], values: Mapping[str, Any]) -> bool:
    """Insert a row unless its primary key or another unique value is there; whether it was inserted."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement = dialect.insert(model).values(**values).on_conflict_do_nothing()
    return session.execute(statement.returning(literal(1))).first() is not None


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver's own idea of when a transaction begins is switched off: `_begin_sqlite` says it.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {round(BUSY_TIMEOUT_S * 1000)}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        # Else INSERT OR REPLACE would remove a row without asking the triggers that guard it.
        "recursive_triggers = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writer = connection.get_execution_options().get("writer")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")
