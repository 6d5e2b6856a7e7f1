"""Migrations of the accounts database, from the package's own files, forward and back.

On PostgreSQL a run is one transaction; so it is on SQLite, whose DDL is transactional too. Two processes that
migrate at once do it one after the other, and the second finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from accounts.database import Database
from accounts.errors import DatabaseUnfit

FOLDER = Path(__file__).resolve().parent / "migrations"
_LOCK = 0x4C4D  # Of PostgreSQL's advisory locks, for one migration at a time.


def migrate(database: Database, revision: str = "head") -> tuple[str | None, str | None]:
    """Bring the schema to a revision, forward; (the one before, the one now)."""
    return _run(database, lambda config: command.upgrade(config, revision))


def migrate_down(database: Database, revision: str = "base") -> tuple[str | None, str | None]:
    """Take the schema back to a revision; what later ones kept is lost."""
    return _run(database, lambda config: command.downgrade(config, revision))


def current_revision(database: Database) -> str | None:
    """The revision of the schema that is there; None for an empty database."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head_revision() -> str:
    """The newest revision that this program knows."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def known_revisions() -> set[str]:
    """Every revision that this program can make."""
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def require_current(database: Database) -> None:
    """Raises DatabaseUnfit, one line, unless the schema is the newest."""
    try:
        found = current_revision(database)
    except DatabaseError as error:
        raise DatabaseUnfit(f"the accounts database does not answer: {_first_line(error)}") from error
    if found != head_revision():
        raise DatabaseUnfit(
            f"the accounts database is at revision {found or 'none'}, this program needs {head_revision()}: "
            "run `metering accounts migrate`"
        )


def _run(database: Database, do: Callable[[Config], object]) -> tuple[str | None, str | None]:
    with database.engine.execution_options(writer=True).begin() as connection:
        if not database.is_sqlite:
            # A large table takes its time.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        before = MigrationContext.configure(connection).get_current_revision()
        config = _config()
        config.attributes["connection"] = connection
        do(config)
        after = MigrationContext.configure(connection).get_current_revision()
    return before, after


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
