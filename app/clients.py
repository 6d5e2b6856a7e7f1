"""Builds the clients of the servers from the settings.."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import clickhouse_connect
import redis
from clickhouse_connect.driver import options
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httputil import get_pool_manager
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.errors import CommandError
from schemas.settings import Settings, SettingsError, one_line

CONNECT_TIMEOUT_S = 5
CLICKHOUSE_TIMEOUT_S = 120
"""A server that is silent for so long in the middle of an insert counts as away; inserts take far less."""
CLICKHOUSE_POOL_SIZE = 4
REDIS_TIMEOUT_S = 10.0
"""Scripts take milliseconds; what takes longer is an outage."""
REDIS_HEALTH_CHECK_S = 15


class ServerAway(CommandError):
    """A server cannot be reached or does not let us in. One line, to be shown as it is."""


def clickhouse_client(settings: Settings, *, timeout_s: float = CLICKHOUSE_TIMEOUT_S) -> Client:
    """A client that is safe to share between threads: it holds no session.

    Connects at once (two small queries) and raises ServerAway when it cannot; the caller decides whether to
    wait. The database need not exist yet. Never tries a request again by itself.
    """
    # The library imports pandas at the first insert, where it is installed, to see whether it was given one of
    # its tables: 2 s of CPU in every flow that starts. Telling it that there is none costs nothing.
    options.pd = options.np = None
    url = urlsplit(settings.clickhouse)
    host = url.hostname or "localhost"
    near = is_loopback(host)
    # Without a session concurrent queries are allowed. Next door, compressing costs more than it saves, and a
    # proxy that the environment names must not come between. A pool of its own, because the default one is
    # shared by every client of the process and keeps connections of servers that are gone.
    try:
        client = clickhouse_connect.get_client(
            host=host,
            port=url.port or (8443 if url.scheme == "https" else 8123),
            interface=url.scheme,
            username=settings.clickhouse_user,
            password=settings.clickhouse_password.get_secret_value(),
            database="default",
            compress=False if near else "lz4",
            autogenerate_session_id=False,
            query_retries=0,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=timeout_s,
            client_name="lingua-metering",
            pool_mgr=get_pool_manager(maxsize=CLICKHOUSE_POOL_SIZE) if near else None,
        )
    except (ClickHouseError, OSError) as error:
        raise ServerAway(f"METERING_CLICKHOUSE={settings.clickhouse}: {one_line(str(error))}") from error
    # Only now: a server refuses every request that names a database which `metering migrate` has yet to make.
    client.database = settings.clickhouse_database
    return client


def redis_client(settings: Settings, *, timeout_s: float = REDIS_TIMEOUT_S) -> redis.Redis:
    """A client that gives bytes and never tries a command again by itself, because the retry of a command
    whose answer was lost would run it twice. Connects on first use."""
    try:
        return redis.Redis.from_url(
            settings.redis,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=min(CONNECT_TIMEOUT_S, timeout_s),
            socket_timeout=timeout_s,
            socket_keepalive=True,
            health_check_interval=REDIS_HEALTH_CHECK_S,
        )
    except ValueError as error:
        raise SettingsError(f"METERING_REDIS={settings.redis!r}: {one_line(str(error))}") from error


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine: localhost or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
