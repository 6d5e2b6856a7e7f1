"""Prepares the servers: ClickHouse's tables and views, Kafka's topics, Redis' epoch. All of it may run again.

Laws:
- A migration file is one statement that does nothing when its effect is there (IF NOT EXISTS, OR REPLACE).
  It is run first and recorded second: a kill in between makes the next run repeat it, to no effect, and two
  programs that migrate at once do the same work twice, to no effect.
- An applied file never changes. Whoever wants another table or view adds a file.
- An existing topic is checked, never altered. Redis is initialised only when there is nothing to lose:
  neither it nor the ledger knows anything yet.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # public names that it forgets to export
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from app.errors import CommandError
from metering.money import REVENUE
from schemas import redis_keys
from schemas.settings import one_line
from schemas.topics import ALERTS, COMMANDS, DEAD_LETTERS, EVENTS
from telemetry import faults
from telemetry.quiet import KAFKA_LOGGER

MIGRATIONS = Path(__file__).resolve().parent.parent / "schemas" / "clickhouse"
OLDEST_CLICKHOUSE = "26.5"
"""The first version that has every setting which the views rely on to keep FINAL whole across partitions."""

KAFKA_TIMEOUT_S = 10.0

_FILE_NAME = re.compile(r"(?P<version>[0-9]{4})_(?P<name>[a-z0-9_]+)\.sql")


class MigrationError(CommandError):
    """A server is not in a state that this program may go on from."""


# ClickHouse ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file; `{database}` in its statement stands for the quoted database."""

    version: int
    name: str
    sha256: str
    statement: str


@dataclass(frozen=True, slots=True)
class Applied:
    """One row of `schema_migrations`."""

    version: int
    name: str
    sha256: str


def load_migrations(directory: Path = MIGRATIONS) -> list[Migration]:
    """The files of `directory` in order. Raises MigrationError when a name or the numbering is wrong."""
    migrations = []
    for number, file in enumerate(sorted(directory.glob("*.sql")), start=1):
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            raise MigrationError(f"migration {file.name}: the name must be NNNN_lower_case_words.sql")
        if int(match["version"]) != number:
            raise MigrationError(
                f"migration {file.name}: expected number {number:04d}, without gaps or twins"
            )
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        migrations.append(Migration(number, match["name"], sha256, content.decode()))
    if not migrations:
        raise MigrationError(f"no migrations in {directory}: the installation is incomplete")
    return migrations


def pending_migrations(migrations: Sequence[Migration], applied: Sequence[Applied]) -> list[Migration]:
    """Those that remain to be applied.

    Raises MigrationError when an applied one changed, is unknown to this program (which is then too old), or
    is missing in between.
    """
    known = {migration.version: migration for migration in migrations}
    for row in sorted(applied, key=lambda row: row.version):
        migration = known.get(row.version)
        if migration is None:
            raise MigrationError(
                f"migration {row.version:04d}_{row.name} was applied by a newer program; this one knows "
                f"{len(migrations):04d} at most: upgrade it"
            )
        if (migration.name, migration.sha256) != (row.name, row.sha256):
            raise MigrationError(
                f"migration {row.version:04d}_{row.name} was changed after it was applied: restore the file "
                "and put the change into a new one"
            )
    done = {row.version for row in applied}
    for version in range(1, len(done) + 1):
        if version not in done:
            raise MigrationError(f"migration {version:04d} is not recorded as applied, but later ones are")
    return [migration for migration in migrations if migration.version not in done]


def run_migrations(client: Client, database: str, directory: Path = MIGRATIONS) -> list[str]:
    """Bring `database` up to date and say what was applied ("0001_usage_events", ...), in order.

    Creates the database and its record of migrations when they are missing. May be killed at any point and
    run again, and may run beside itself. Raises MigrationError; never retries.
    """
    if not client.min_version(OLDEST_CLICKHOUSE):
        raise MigrationError(f"ClickHouse is {client.server_version}; {OLDEST_CLICKHOUSE} or newer is needed")
    migrations = load_migrations(directory)
    try:
        client.command(f"CREATE DATABASE IF NOT EXISTS `{database}`", use_database=False)
        client.command(_create_record_of_migrations(database))
        pending = pending_migrations(migrations, _applied(client, database))
    except ClickHouseError as error:
        raise MigrationError(f"ClickHouse database {database}: {_short(error)}") from error
    names = []
    for migration in pending:
        name = f"{migration.version:04d}_{migration.name}"
        try:
            # The effect first, the record second; killed in between, the next run repeats the effect.
            client.command(migration.statement.replace("{database}", f"`{database}`"))
            faults.reach(faults.DURING_MIGRATION)
            client.command(_record(database, migration), settings={"async_insert": 0})
        except ClickHouseError as error:
            raise MigrationError(f"migration {name} failed: {_short(error)}") from error
        names.append(name)
    return names


def _create_record_of_migrations(database: str) -> str:
    # The whole record is the key: two programs that disagree on a file both leave their trace.
    return (
        f"CREATE TABLE IF NOT EXISTS `{database}`.schema_migrations "
        "(version UInt32, name String, sha256 String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3)) "
        "ENGINE = ReplacingMergeTree ORDER BY (version, name, sha256)"
    )


def _applied(client: Client, database: str) -> list[Applied]:
    rows = client.query(
        f"SELECT DISTINCT version, name, sha256 FROM `{database}`.schema_migrations ORDER BY version"
    ).result_rows
    return [Applied(version, name, sha256) for version, name, sha256 in rows]


def _record(database: str, migration: Migration) -> str:
    # Nothing here needs quoting: the name is [a-z0-9_]+ and the digest hexadecimal.
    return (
        f"INSERT INTO `{database}`.schema_migrations (version, name, sha256) "
        f"SELECT {migration.version}, '{migration.name}', '{migration.sha256}'"
    )


# Kafka --------------------------------------------------------------------------------------------------

TOPIC_CONFIGS: Mapping[str, Mapping[str, str]] = {
    EVENTS: {"max.message.bytes": "1048588"},
    # Money commands are few, and the only record of what people were given.
    COMMANDS: {"max.message.bytes": "1048588", "retention.ms": "-1"},
    # A refused message may be as large as the broker let in, and gets headers on top.
    DEAD_LETTERS: {"max.message.bytes": "1148588"},
    ALERTS: {"max.message.bytes": "1048588"},
}
"""What each topic is made with, besides the timestamp type. The broker lets in far more than the 64 KiB that
are accepted, so that a message that is too large becomes a dead letter, not an error at its producer."""

TIMESTAMP_TYPE = "message.timestamp.type"


def create_topics(
    bootstrap: str,
    partitions: int,
    broker_append_time: bool,
    *,
    topics: Mapping[str, Mapping[str, str]] = TOPIC_CONFIGS,
    replication_factor: int = 1,
    timeout_s: float = KAFKA_TIMEOUT_S,
) -> list[str]:
    """Create the topics that are missing, check those that exist, and return the names of the created ones.

    With `broker_append_time` a topic is made with, and must have, LogAppendTime. Blocks for up to `timeout_s`
    a request; raises MigrationError; a crash leaves some topics made, which the next run then checks.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap}, logger=KAFKA_LOGGER)
    existing = _topic_partitions(admin, bootstrap, timeout_s)
    missing = [name for name in topics if name not in existing]
    append_time = {TIMESTAMP_TYPE: "LogAppendTime"} if broker_append_time else {}
    created = _create(
        admin,
        [
            NewTopic(name, partitions, replication_factor, config={**topics[name], **append_time})
            for name in missing
        ],
        timeout_s,
    )
    _await_topics(admin, bootstrap, list(topics), timeout_s)
    if broker_append_time:
        for name in topics:
            require_append_time(admin, name, timeout_s)
    return created


def _create(admin: AdminClient, new: list[NewTopic], timeout_s: float) -> list[str]:
    if not new:
        return []
    created = []
    for name, outcome in admin.create_topics(new, request_timeout=timeout_s).items():
        try:
            outcome.result()
            created.append(name)
        except KafkaException as error:
            # Someone else was faster: what they made is checked like any topic that was there.
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise MigrationError(f"Kafka topic {name} cannot be created: {_kafka(error)}") from error
    return created


def _topic_partitions(admin: AdminClient, bootstrap: str, timeout_s: float) -> dict[str, int]:
    try:
        metadata = admin.list_topics(timeout=timeout_s)
    except KafkaException as error:
        raise MigrationError(f"METERING_KAFKA={bootstrap}: {_kafka(error)}") from error
    return {
        name: len(topic.partitions)
        for name, topic in metadata.topics.items()
        if topic.error is None and topic.partitions
    }


def _await_topics(admin: AdminClient, bootstrap: str, names: list[str], timeout_s: float) -> None:
    """A broker may list a topic a moment after it said that it was created."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        existing = _topic_partitions(admin, bootstrap, timeout_s)
        absent = [name for name in names if name not in existing]
        if not absent:
            return
        if time.monotonic() > give_up_at:
            raise MigrationError(f"Kafka topic {absent[0]} has no partitions")
        time.sleep(0.05)


def require_append_time(admin: AdminClient, name: str, timeout_s: float = KAFKA_TIMEOUT_S) -> None:
    """Raise MigrationError, one line, unless the topic says that the broker stamps its messages."""
    resource = ConfigResource(ResourceType.TOPIC, name)
    try:
        [outcome] = admin.describe_configs([resource], request_timeout=timeout_s).values()
        entry = outcome.result().get(TIMESTAMP_TYPE)
    except KafkaException as error:
        raise MigrationError(f"Kafka topic {name}: its settings cannot be read: {_kafka(error)}") from error
    found = entry.value if entry is not None else None
    if found != "LogAppendTime":
        raise MigrationError(
            f"Kafka topic {name} has {TIMESTAMP_TYPE}={found}; it must be LogAppendTime (or, for a broker "
            "that cannot, METERING_BROKER_APPEND_TIME=false)"
        )


def _kafka(error: KafkaException) -> str:
    return one_line(error.args[0].str())


# Redis --------------------------------------------------------------------------------------------------

FIRST_EPOCH = 1


def initialise_redis(redis_client: redis.Redis, clickhouse_client: Client, database: str) -> int:
    """Give a new Redis its epoch and its fence, and return the epoch; leave one that has them as it is.

    Both keys are set by one command, so there is no moment with one of them. A crash before it changes
    nothing, a crash after it leaves everything done. Raises MigrationError when Redis is empty, or older than
    the ledger, although there is money in the ledger: only `metering rebuild-balances` may repair that.
    """
    try:
        return _initialise_redis(redis_client, clickhouse_client, database)
    except redis.RedisError as error:
        raise MigrationError(f"Redis: {one_line(str(error))}") from error
    except ClickHouseError as error:
        raise MigrationError(f"ClickHouse database {database}: {_short(error)}") from error


def _initialise_redis(redis_client: redis.Redis, clickhouse_client: Client, database: str) -> int:
    epoch = _epoch(redis_client)
    if epoch is None:
        refusal = _why_not_new(redis_client, clickhouse_client, database)
        # Asked again, because another `migrate` may have gone ahead while we looked, and the flows after it.
        epoch = _epoch(redis_client)
        if epoch is None and refusal is not None:
            raise MigrationError(refusal)
        if epoch is None:
            # All or nothing; refused when another `migrate` was faster, whose epoch then counts.
            redis_client.msetnx({redis_keys.EPOCH: FIRST_EPOCH, redis_keys.FENCE: 0})
            epoch = _epoch(redis_client)
    if epoch is None:
        raise MigrationError("Redis keeps no epoch: someone else deletes its keys")
    _refuse_rolled_back(redis_client, clickhouse_client, database, epoch)
    return epoch


def _epoch(redis_client: redis.Redis) -> int | None:
    text = redis_client.get(redis_keys.EPOCH)
    if text is None:
        return None
    if not isinstance(text, bytes) or not re.fullmatch(rb"[1-9][0-9]{0,17}", text):
        raise MigrationError(f"Redis key {redis_keys.EPOCH} is {text!r}, not a positive integer")
    return int(text)


def _why_not_new(redis_client: redis.Redis, clickhouse_client: Client, database: str) -> str | None:
    lines = _single(clickhouse_client, f"SELECT count() FROM `{database}`.ledger FINAL")
    key = _any_key_of_ours(redis_client)
    if key is not None:
        return f"Redis has {key} but no epoch (the ledger has {lines} lines): run `metering rebuild-balances`"
    if lines:
        return f"Redis is empty but the ledger has {lines} lines: run `metering rebuild-balances`"
    return None


def _any_key_of_ours(redis_client: redis.Redis) -> str | None:
    """Some key that only a Redis in use has. Walks all keys, but only where there is no epoch."""
    for key in (
        redis_keys.REBUILDING,
        redis_keys.ENTRIES,
        redis_keys.LEDGER_STREAM,
        redis_keys.LIVE_CELLS,
        redis_keys.FENCE,
        redis_keys.RATE_VERSIONS,
        redis_keys.POSITIONS,
        redis_keys.LOG,
    ):
        if redis_client.exists(key):
            return key
    prefixes = (redis_keys.BALANCE_PREFIX, redis_keys.CELL_PREFIX, redis_keys.REQUEST_PREFIX)
    for raw in redis_client.scan_iter(count=1000):
        found: str = raw.decode("utf-8", "backslashreplace")
        if found.startswith(prefixes):
            return found
    return None


def _refuse_rolled_back(
    redis_client: redis.Redis, clickhouse_client: Client, database: str, epoch: int
) -> None:
    """The ledger follows Redis, so whatever it has, Redis must have: epochs and the numbers of lines. The
    platform's revenue account has a part in every charge, so it shows a lost tail first."""
    newest = _single(clickhouse_client, f"SELECT max(epoch) FROM `{database}`.ledger")
    if newest > epoch:
        raise MigrationError(
            f"Redis is at epoch {epoch} but the ledger at {newest}: an old Redis came back; run "
            "`metering rebuild-balances`"
        )
    stored = _single(
        clickhouse_client, f"SELECT max(seq) FROM `{database}`.ledger WHERE account = '{REVENUE}'"
    )
    live = int(redis_client.hget(redis_keys.balance(REVENUE), "seq") or 0)
    if stored > live:
        raise MigrationError(
            f"Redis knows {live} lines of {REVENUE} but the ledger {stored}: Redis lost its end; run "
            "`metering rebuild-balances`"
        )


def _single(client: Client, query: str) -> int:
    return int(client.query(query).result_rows[0][0])


def _short(error: ClickHouseError) -> str:
    text = one_line(str(error))
    return text if len(text) <= 300 else text[:297] + "..."
