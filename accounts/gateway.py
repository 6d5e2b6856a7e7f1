"""What this package asks of the pipeline: balances in Redis, statements in ClickHouse, money commands on Kafka.

Every call is bounded by its client's timeouts and raises `Refused` (BALANCES_AWAY, ARCHIVE_AWAY,
COMMANDS_AWAY) when the server does not answer. Nothing is written but commands: balances change in the
settlement flow only.

A Redis without an epoch is empty or being rebuilt: what it says is not believed, a balance of 0 least of all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from accounts.errors import Reason, Refused
from metering.money import US_PER_MINUTE
from schemas import redis_keys, topics

DELIVERY_TIMEOUT_S = 10.0
POLL_S = 0.02
QUERY_SETTINGS = {"max_execution_time": 15}

log = logging.getLogger("lingua.accounts")


@dataclass(frozen=True)
class Balance:
    """An account's live balance (service microseconds). One that nothing was ever posted to has 0."""

    account: str
    balance_us: int
    held_us: int
    floor_us: int
    updated_at_ms: int | None


@dataclass(frozen=True)
class RequestResult:
    """The first result of a money command, which is its only one."""

    digest: str
    outcome: str
    """APPLIED, OVER_LIMIT or INSUFFICIENT."""
    amount_us: int
    balance_us: int
    at_ms: int


@dataclass(frozen=True)
class StatementLine:
    """One ledger line."""

    account: str
    seq: int
    session_id: str
    room_id: str
    change_us: int
    balance_before_us: int
    balance_after_us: int
    reason: str
    request_id: str
    cell_id: str
    note: str
    posted_at_ms: int


@dataclass(frozen=True)
class UsageTotal:
    """What a user was charged in one session or room."""

    id: str
    charged_us: int
    total_us: int
    """Of all who paid."""
    minutes: int
    """Windows of one minute in which the user paid something."""
    first_window_start_ms: int
    last_window_start_ms: int
    settled: bool


class Balances:
    """Redis, read only."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def read(self, accounts: Sequence[str]) -> dict[str, Balance]:
        """The live balances of all of these, in one round trip."""
        fields = ("balance_us", "held_us", "floor_us", "updated_at_ms")
        replies = self._ask([(redis_keys.balance(account), fields) for account in accounts])
        found = {}
        for account, (balance, held, floor, updated) in zip(accounts, replies, strict=True):
            found[account] = Balance(
                account,
                int(balance or 0),
                int(held or 0),
                int(floor or redis_keys.DEFAULT_FLOOR_US),
                int(updated) if updated else None,
            )
        return found

    def result(self, request_id: str) -> RequestResult | None:
        """The result of a money command that Redis still has; None for one that was not carried out, or long
        ago.
        """
        fields = ("digest", "outcome", "amount_us", "balance_us", "at_ms")
        [reply] = self._ask([(redis_keys.request(request_id), fields)])
        digest, outcome, amount, balance, at = reply
        if digest is None or outcome is None or amount is None or balance is None:
            return None
        return RequestResult(digest.decode(), outcome.decode(), int(amount), int(balance), int(at or 0))

    def _ask(self, hashes: Sequence[tuple[str, Sequence[str]]]) -> list[list[bytes | None]]:
        """These fields of these hashes, and the epoch, in one step."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.get(redis_keys.EPOCH)
        for key, fields in hashes:
            pipeline.hmget(key, list(fields))
        try:
            epoch, *replies = pipeline.execute()
        except (redis.RedisError, OSError) as error:
            log.warning("Redis does not answer: %s", _one_line(error))
            raise Refused(
                Reason.BALANCES_AWAY, "the balances cannot be read now; try again later", retry_after_s=5
            ) from None
        if epoch is None:
            raise Refused(
                Reason.BALANCES_AWAY,
                "the balances are being restored and are not known now; try again later",
                retry_after_s=30,
            )
        return replies


class Archive:
    """ClickHouse, read only; connects at the first question."""

    def __init__(self, connect: Callable[[], Client], database: str) -> None:
        self._connect = connect
        self._database = database
        self._client: Client | None = None
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Whether it answers now."""
        try:
            self._rows("SELECT 1", {})
        except Refused:
            return False
        return True

    def statement(self, account: str, before_seq: int | None, limit: int) -> list[StatementLine]:
        """At most `limit` ledger lines of an account, the newest first, of those older than `before_seq`."""
        rows = self._rows(
            """
            SELECT account, seq, session_id, room_id, change_us, balance_before_us, balance_after_us, reason,
                   request_id, cell_id, note, posted_at_ms
            FROM {database}.account_statements
            WHERE account = {account:String} AND seq < {before:Int64}
            ORDER BY seq DESC LIMIT {limit:UInt32}
            """,
            {"account": account, "before": before_seq if before_seq is not None else 2**62, "limit": limit},
        )
        return [StatementLine(*row) for row in rows]

    def usage_by_session(self, user_id: str, before: tuple[int, str] | None, limit: int) -> list[UsageTotal]:
        """What the user was charged per session without a room, the latest first."""
        return self._usage(
            "session_bills", "session_id", "charged_us", "session_total_us", user_id, before, limit
        )

    def usage_by_room(self, user_id: str, before: tuple[int, str] | None, limit: int) -> list[UsageTotal]:
        """The user's shares per room, the latest first."""
        return self._usage("room_bills", "room_id", "share_us", "room_total_us", user_id, before, limit)

    def result(self, request_id: str) -> RequestResult | None:
        """The result of a money command, however old; None for one that is not known (yet)."""
        rows = self._rows(
            """
            SELECT digest, outcome, amount_us, balance_us, posted_at_ms FROM {database}.requests FINAL
            WHERE request_id = {request_id:String}
            """,
            {"request_id": request_id},
        )
        return RequestResult(*rows[0]) if rows else None

    def _usage(
        self,
        view: str,
        id_column: str,
        share: str,
        total: str,
        user_id: str,
        before: tuple[int, str] | None,
        limit: int,
    ) -> list[UsageTotal]:
        last_ms, last_id = before or (2**62, "")
        rows = self._rows(
            f"""
            SELECT {id_column}, {share}, {total}, cells, first_window_start_ms, last_window_start_ms, settled
            FROM {{database}}.{view}
            WHERE user_id = {{user:String}}
              AND (last_window_start_ms, {id_column}) < ({{last:Int64}}, {{id:String}})
            ORDER BY last_window_start_ms DESC, {id_column} DESC LIMIT {{limit:UInt32}}
            """,
            {"user": user_id, "last": last_ms, "id": last_id, "limit": limit},
        )
        return [UsageTotal(*row) for row in rows]

    def _rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        try:
            client = self._connected()
            result = client.query(
                query.replace("{database}", f"`{self._database}`"),
                parameters=dict(parameters),
                settings=dict(QUERY_SETTINGS),
            )
            return [tuple(row) for row in result.result_rows]
        except (ClickHouseError, OSError) as error:
            log.warning("ClickHouse does not answer: %s", _one_line(error))
        except Exception as error:
            # What building the client raises is the builder's own.
            if type(error).__name__ != "ServerAway":
                raise
            log.warning("%s", _one_line(error))
        raise Refused(
            Reason.ARCHIVE_AWAY, "the archive cannot be read now; try again later", retry_after_s=10
        )

    def _connected(self) -> Client:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client


class Commands:
    """Kafka: sends money commands and knows of each whether it was delivered.

    The producer is idempotent and waits for all replicas. A delivery that was not confirmed may still have
    happened; the request id makes sending it again harmless.
    """

    def __init__(self, producer_settings: Mapping[str, object], topic: str = topics.COMMANDS) -> None:
        """`producer_settings`: librdkafka's, with acks=all, idempotence and the partitioner of every client
        here.
        """
        self._settings = {
            **producer_settings,
            "message.timeout.ms": round(DELIVERY_TIMEOUT_S * 1000),
            "log_level": 0,
        }
        self._topic = topic
        self._lock = threading.Lock()
        self._producer: Producer | None = None
        self._poller: threading.Thread | None = None
        self._closed = threading.Event()

    def send(self, message: bytes, account: str) -> Future[None]:
        """Hand a command to the producer; done when all replicas have it, or failed with Refused, COMMANDS_AWAY."""
        delivered: Future[None] = Future()

        def confirm(error: KafkaError | None, _message: Message) -> None:
            if error is None:
                delivered.set_result(None)
                return
            log.warning("a command was not delivered: %s", error.str())
            # A producer whose broker came back as another one never delivers again: the next send has its own.
            self._discard()
            delivered.set_exception(_commands_away())

        try:
            self._running().produce(self._topic, key=account.encode(), value=message, on_delivery=confirm)
        except (BufferError, KafkaException) as error:
            log.warning("a command was not taken: %s", _one_line(error))
            delivered.set_exception(_commands_away())
        return delivered

    def close(self) -> None:
        """Wait for what was handed in, briefly, and stop."""
        self._closed.set()
        with self._lock:
            producer, self._producer = self._producer, None
            poller = self._poller
        if poller is not None:
            poller.join(5)
        if producer is not None:
            producer.flush(5)

    def _running(self) -> Producer:
        with self._lock:
            if self._producer is None:
                self._producer = Producer(self._settings)
                self._poller = threading.Thread(
                    target=self._poll, args=(self._producer,), name="kafka-deliveries", daemon=True
                )
                self._poller.start()
            return self._producer

    def _poll(self, producer: Producer) -> None:
        while not self._closed.is_set() and (self._producer is producer or len(producer)):
            producer.poll(0.1)

    def _discard(self) -> None:
        with self._lock:
            self._producer = None


@dataclass(frozen=True)
class Gateway:
    """The three together."""

    balances: Balances
    archive: Archive
    commands: Commands


def minutes_text(amount_us: int) -> str:
    """Minutes for people, as decimal text: to the 9th place, which tells single microseconds apart."""
    value = (Decimal(amount_us) / US_PER_MINUTE).quantize(Decimal("1e-9"))
    text = f"{value:f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _commands_away() -> Refused:
    return Refused(
        Reason.COMMANDS_AWAY,
        "it is not known whether the command was taken; repeat it with the same Idempotency-Key",
        retry_after_s=5,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
