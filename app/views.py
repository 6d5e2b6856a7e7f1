"""What people ask for: a balance, a statement, a bill. Read from the servers here, shown by `app.tables`.

The readers block for as long as the clients' timeouts and raise CommandError, one line, when a server is
away, refuses, or knows nothing of what was asked for. Amounts are service microseconds (`_us`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError

from app.clients import ServerAway
from app.errors import CommandError
from schemas import redis_keys
from schemas.settings import one_line


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's live balance, as the scheduler sees it."""

    account: str
    balance_us: int
    held_us: int
    floor_us: int
    seq: int
    updated_at_ms: int


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One change of one balance."""

    account: str
    seq: int
    posted_at_ms: int
    reason: str
    change_us: int
    balance_before_us: int
    balance_after_us: int
    cell_id: str
    request_id: str
    rate_version: str
    note: str


@dataclass(frozen=True, slots=True)
class Share:
    """What one user pays for a room or a session."""

    scope: str
    user_id: str
    share_us: int
    total_us: int
    windows: int
    """Windows of one minute in which the user was a payer."""
    settled: bool


def read_balance(client: redis.Redis, account: str) -> Balance:
    """The live balance. CommandError when nothing was ever posted to the account."""
    found = read_balances(client, [account])
    if not found:
        raise CommandError(f"{account} has no balance: nothing was ever posted to it")
    return found[0]


def read_balances(client: redis.Redis, accounts: list[str]) -> list[Balance]:
    """The live balances of those accounts that have one, in the order asked for."""
    pipeline = client.pipeline(transaction=False)
    for account in accounts:
        pipeline.hgetall(redis_keys.balance(account))
    try:
        hashes = pipeline.execute()
    except (redis.RedisError, OSError) as error:
        raise ServerAway(f"Redis does not answer: {one_line(str(error))}") from error
    return [_balance(account, fields) for account, fields in zip(accounts, hashes, strict=True) if fields]


def _balance(account: str, fields: Mapping[bytes, bytes]) -> Balance:
    return Balance(
        account=account,
        balance_us=int(fields.get(b"balance_us", 0)),
        held_us=int(fields.get(b"held_us", 0)),
        floor_us=int(fields.get(b"floor_us", redis_keys.DEFAULT_FLOOR_US)),
        seq=int(fields.get(b"seq", 0)),
        updated_at_ms=int(fields.get(b"updated_at_ms", 0)),
    )


def read_statement(client: Client, database: str, account: str, limit: int) -> list[StatementLine]:
    """The newest `limit` ledger lines of an account, oldest first."""
    rows = query_rows(
        client,
        f"""
        SELECT account, seq, posted_at_ms, reason, change_us, balance_before_us, balance_after_us, cell_id,
               request_id, rate_version, note
        FROM (
            SELECT * FROM `{database}`.account_statements
            WHERE account = {{account:String}} ORDER BY seq DESC LIMIT {{limit:UInt32}}
        ) ORDER BY seq
        """,
        {"account": account, "limit": limit},
    )
    return [StatementLine(*row) for row in rows]


def read_bill(client: Client, database: str, scope: str) -> list[Share]:
    """Each payer's share of a room or session, the dearest first."""
    if scope.startswith("room/"):
        view, share, total = "room_bills", "share_us", "room_total_us"
    else:
        view, share, total = "session_bills", "charged_us", "session_total_us"
    rows = query_rows(
        client,
        f"""
        SELECT scope, user_id, {share}, {total}, cells, settled FROM `{database}`.{view}
        WHERE scope = {{scope:String}} ORDER BY {share} DESC, user_id
        """,
        {"scope": scope},
    )
    return [Share(*row) for row in rows]


def query_rows(client: Client, query: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Run a query. ServerAway, one line, when it fails."""
    try:
        return [tuple(row) for row in client.query(query, parameters=dict(parameters)).result_rows]
    except (ClickHouseError, OSError) as error:
        raise ServerAway(f"ClickHouse cannot answer: {one_line(str(error))[:300]}") from error
