"""The accounts on both databases: every test that uses `database` runs on SQLite and on PostgreSQL.

One PostgreSQL server for the session; each test has a database of its own, copied from a migrated one.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pgserver
import pytest
import redis
from fastapi.testclient import TestClient
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import create_engine, make_url, text

from accounts.api.app import create_app
from accounts.context import Accounts, AccountsConfig
from accounts.database import Database, sqlite_url
from accounts.gateway import Archive, Balances, Commands, Gateway
from accounts.migrate import migrate
from accounts.secrets import Secrets, check_secret
from app.clients import ServerAway
from tests.accounts.support import CHEAP, SECRET, Client, Clock

MakeUrl = Callable[[str], str]
"""Gives the URL of a new database: empty, or "migrated"."""


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running PostgreSQL, whose database `migrated` is migrated."""
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    try:
        url = server.get_uri()
        # Nothing here outlives the session: waiting for the disk would prove nothing.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            _administer(url, f"ALTER SYSTEM SET {setting} = off")
        _administer(url, "SELECT pg_reload_conf()")
        _administer(url, "CREATE DATABASE migrated")
        made = Database(_named(url, "migrated"))
        migrate(made)
        made.close()
        yield url
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database, closed."""
    file = tmp_path_factory.mktemp("sqlite") / "template.db"
    made = Database(sqlite_url(file))
    migrate(made)
    made.close()
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def dialect(request: pytest.FixtureRequest) -> str:
    """Which database."""
    return str(request.param)


@pytest.fixture
def make_url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], str]:
    """Makes a database of a dialect, "empty" or "migrated", and gives its URL."""

    def make(dialect: str, kind: str) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        if dialect == "sqlite":
            file = tmp_path / f"{name}.db"
            if kind == "migrated":
                shutil.copy(request.getfixturevalue("sqlite_template"), file)
            return sqlite_url(file)
        server = request.getfixturevalue("postgres")
        _administer(server, f"CREATE DATABASE {name}" + (" TEMPLATE migrated" if kind == "migrated" else ""))
        request.addfinalizer(lambda: _administer(server, f"DROP DATABASE {name} WITH (FORCE)"))
        return _named(server, name)

    return make


@pytest.fixture
def database_url(dialect: str, make_url_of: Callable[[str, str], str]) -> str:
    """The URL of a migrated database that no other test has."""
    return make_url_of(dialect, "migrated")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """That database."""
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    """A clock that a test sets."""
    return Clock()


@pytest.fixture
def accounts(database: Database, clock: Clock) -> Accounts:
    """The domain, with cheap hashes."""
    secrets = Secrets(SECRET)
    check_secret(database, secrets)
    return Accounts(database, secrets, AccountsConfig(argon2=CHEAP, command_wait_s=0.3), clock)


@pytest.fixture
def no_gateway() -> Gateway:
    """A pipeline of which every server is away."""

    def away() -> object:
        raise ServerAway("no ClickHouse here")

    nowhere = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))
    return Gateway(
        Balances(nowhere),
        Archive(away, "lingua"),  # type: ignore[arg-type] # never gives one
        Commands({"bootstrap.servers": "127.0.0.1:1"}),
    )


@pytest.fixture
def client(accounts: Accounts, no_gateway: Gateway) -> Iterator[Client]:
    """The API, with the pipeline away."""
    with TestClient(create_app(accounts, no_gateway)) as http:
        yield Client(http, accounts)


def _administer(server: str, statement: str) -> None:
    engine = create_engine(
        make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _named(server: str, database: str) -> str:
    return make_url(server).set(database=database).render_as_string(hide_password=False)
