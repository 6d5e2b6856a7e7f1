"""Builds the accounts API from the settings: database, keys, and the clients of the pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import DatabaseError

from accounts.api.app import create_app
from accounts.backup import BackupError
from accounts.context import Accounts, AccountsConfig
from accounts.database import Database, sqlite_url
from accounts.errors import DatabaseUnfit, Refused
from accounts.gateway import Archive, Balances, Commands, Gateway
from accounts.migrate import require_current
from accounts.passwords import Argon2Parameters
from accounts.secrets import Secrets, check_secret, secret_in_file
from accounts.write_off import WriteOffAccounts
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from schemas.settings import Settings, load_settings, one_line
from sinks.kafka import producer_settings

REDIS_TIMEOUT_S = 2.0
CLICKHOUSE_TIMEOUT_S = 20.0
"""Somebody is waiting for the answer."""
STOP_DEADLINE_S = 15
"""How long requests may go on after SIGTERM; a top-up waits for its result at most so long."""


def open_database(settings: Settings) -> Database:
    """The accounts database; nothing is opened yet, but the directory of an SQLite file is made."""
    url = settings.accounts_database or sqlite_url(settings.state_dir / "accounts.db")
    return Database(url, pool_size=settings.accounts_pool_size)


def open_secrets(settings: Settings, *, make: bool = True) -> Secrets:
    """The keys of the accounts; without a setting, from the file in the state directory, which `make` makes."""
    given = settings.accounts_secret.get_secret_value()
    file = settings.state_dir / "accounts.secret"
    if not given and not make and not file.exists():
        raise CommandError(
            f"put the secret that the backup was made under into {file}, or METERING_ACCOUNTS_SECRET"
        )
    try:
        return Secrets(given or secret_in_file(file))
    except (OSError, ValueError) as error:
        raise CommandError(f"{file}: {error}") from error


def open_accounts(settings: Settings) -> Accounts:
    """The domain on a database that is migrated and kept under this secret; else CommandError, one line."""
    database = open_database(settings)
    with clear_failures():
        require_current(database)
        secrets = open_secrets(settings)
        check_secret(database, secrets)
    config = AccountsConfig(
        access_token_s=settings.accounts_access_token_s,
        refresh_token_s=settings.accounts_refresh_token_s,
        argon2=Argon2Parameters(settings.accounts_argon2_time_cost, settings.accounts_argon2_memory_kib),
        command_wait_s=settings.accounts_command_wait_ms / 1000,
    )
    return Accounts(database, secrets, config, now_ms)


def open_gateway(settings: Settings) -> Gateway:
    """The pipeline's servers; none of them need be there yet."""
    return Gateway(
        Balances(redis_client(settings, timeout_s=REDIS_TIMEOUT_S)),
        Archive(
            lambda: clickhouse_client(settings, timeout_s=CLICKHOUSE_TIMEOUT_S), settings.clickhouse_database
        ),
        Commands({**producer_settings(settings.kafka), "linger.ms": 0}),
    )


def open_write_off_accounts(settings: Settings) -> WriteOffAccounts:
    """What the write-off flow reads and records; CommandError when the database is not there or not migrated."""
    database = open_database(settings)
    with clear_failures():
        require_current(database)
    return WriteOffAccounts(database, now_ms)


def create() -> FastAPI:
    """The application of this process, for uvicorn: `uvicorn --factory app.accounts_service:create`."""
    settings = load_settings()
    accounts, gateway = open_accounts(settings), open_gateway(settings)
    app = create_app(accounts, gateway)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def closing(application: FastAPI) -> AsyncIterator[None]:
        async with inner(application):
            yield
        gateway.commands.close()
        accounts.database.close()

    app.router.lifespan_context = closing
    return app


def serve(host: str, port: int, workers: int, trusted_proxies: str) -> None:
    """Serve until SIGTERM or SIGINT. METERING_READY_FILE, when set, is written once the port is open."""
    # Said here, in one line, rather than by a worker in a traceback.
    open_accounts(load_settings()).database.close()
    config = uvicorn.Config(
        "app.accounts_service:create",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=trusted_proxies or None,
        timeout_graceful_shutdown=STOP_DEADLINE_S,
    )
    if workers > 1:
        uvicorn.run(
            config.app,
            factory=True,
            host=host,
            port=port,
            workers=workers,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=config.proxy_headers,
            forwarded_allow_ips=trusted_proxies or None,
            timeout_graceful_shutdown=STOP_DEADLINE_S,
        )
        return
    _Server(config).run()


class _Server(uvicorn.Server):
    async def startup(self, *arguments: object, **named: object) -> None:
        await super().startup(*arguments, **named)  # type: ignore[arg-type] # whatever it takes
        ready = os.environ.get("METERING_READY_FILE")
        if ready and self.started:
            Path(ready).touch()


@contextmanager
def clear_failures() -> Iterator[None]:
    """What is expected to go wrong becomes a CommandError, one line."""
    try:
        yield
    except (DatabaseUnfit, BackupError) as problem:
        raise CommandError(str(problem)) from problem
    except Refused as problem:
        raise CommandError(problem.detail, exit_code=2) from problem
    except DatabaseError as problem:
        raise CommandError(f"METERING_ACCOUNTS_DATABASE: {one_line(str(problem.orig))[:300]}") from problem


def now_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000
