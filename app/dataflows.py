"""The flows with their clients, as factories: `python -m bytewax.run "app.dataflows:settlement()"`.

Calling a factory reads the settings, connects, and refuses with one line what it cannot work with; importing
this module opens nothing. METERING_READY_FILE, when set, is written once a flow has all it needs.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import redis
from bytewax.dataflow import Dataflow
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from prometheus_client import start_http_server

import flows.alerts
import flows.ledger
import flows.settlement
import flows.usage_store
import flows.write_off
from app.books import BooksDiffer, check_log, expected_epoch, register_rates, remember_entry, seen_entry
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from app.fence_keeper import FenceKeeper
from app.migrate import require_append_time
from app.write_offs import run_period
from flows.settlement import SettlementRules
from metering.cells import WINDOW_MS, window_start_ms
from metering.outbox import Continuity
from metering.ports import WrongRedis
from schemas.decode import FUTURE_TOLERANCE_MS
from schemas.ports import StoreRefused
from schemas.rate_card import load_rate_card
from schemas.redis_keys import ALERTS_SENT
from schemas.rejections import RejectReason
from schemas.settings import Settings, SettingsError, load_settings, one_line
from schemas.topics import ALERTS, COMMANDS, DEAD_LETTERS, EVENTS
from sinks.balances import RedisBalances, heals
from sinks.clickhouse import ClickHouseJournal, ClickHouseUsageStore
from sinks.kafka import ConfirmedProducer, DeadLetterSink, KafkaDeadLetters, Outgoing
from sinks.outbox import RedisOutbox
from sinks.retrying import retrying
from sources.archive import ClickHouseArchive
from sources.kafka import KafkaSource, Progress, WrongLog
from sources.outbox import OutboxSource
from sources.timer import PeriodSource
from telemetry import metrics


def now_ms() -> int:
    """The wall clock, in ms since the Unix epoch."""
    return time.time_ns() // 1_000_000


def say(line: str) -> None:
    """One line on standard error."""
    print(f"metering: {line}", file=sys.stderr, flush=True)  # noqa: T201


def settlement() -> Dataflow:
    """Events and money commands to live balances in Redis."""
    return _built(_settlement)


def usage_store() -> Dataflow:
    """Events and dead letters to ClickHouse."""
    return _built(_usage_store)


def ledger() -> Dataflow:
    """The outbox in Redis to the ledger in ClickHouse."""
    return _built(_ledger)


def alerts() -> Dataflow:
    """Thresholds that balances fell past, from the outbox in Redis to Kafka."""
    return _built(_alerts)


def write_off() -> Dataflow:
    """Every period, debts paid from the credit of bound nodes: money commands, and the accounts' audit log."""
    return _built(_write_off)


def _settlement(settings: Settings) -> Dataflow:
    metrics.start_known_series("settlement", [reason.value for reason in RejectReason])
    card = load_rate_card(settings.rate_card)
    client = redis_client(settings)
    epoch = expected_epoch(settings, client)
    book = RedisBalances(
        client,
        epoch,
        settings.outbox_max_entries,
        seen_entry=seen_entry(settings, client, epoch),
        on_retry=_counted("Redis, post"),
    )
    book.fence()
    register_rates(client, card)
    progress = Progress()

    def raise_fence_past(topic: str, first_offset: int, appended_at_ms: int) -> None:
        # What was deleted was appended earlier, so its event times end at most the tolerance later.
        lost_until_ms = appended_at_ms + FUTURE_TOLERANCE_MS
        fence_ms = book.raise_fence(window_start_ms(lost_until_ms) + WINDOW_MS)
        say(
            f"{topic}: the log starts at offset {first_offset}, what was before is deleted; windows before "
            f"{fence_ms} ms are frozen, `metering resettle` settles them from the usage store"
        )

    events = kafka_source(settings, EVENTS, progress=progress, on_missing_head=raise_fence_past)
    log = events.log
    revision_base = check_log(client, EVENTS, log)

    def each_turn() -> None:
        book.expire_grants()
        book.compact_requests(settings.request_retention_s * 1000)
        remember_entry(settings, epoch, book.seen_entry)

    FenceKeeper(
        settings.kafka,
        EVENTS,
        client,
        book,
        progress,
        lag_ms=settings.fence_lag_s * 1000,
        interval_s=settings.fence_interval_s,
        say=say,
        each_turn=each_turn,
    ).start()
    return flows.settlement.build_flow(
        events,
        kafka_source(settings, COMMANDS, reread=True),
        DeadLetterSink(
            lambda: KafkaDeadLetters(settings.kafka, EVENTS, log.topic_id, _counted("Kafka, dead letters"))
        ),
        book,
        SettlementRules(
            card,
            presence_max_ms=settings.presence_max_s * 1000,
            idle_timeout_ms=settings.idle_timeout_s * 1000,
            emit_interval_ms=settings.emit_interval_ms,
            revision_base=revision_base,
        ),
        now_ms,
    )


def _usage_store(settings: Settings) -> Dataflow:
    linger = timedelta(milliseconds=settings.usage_linger_ms)
    return flows.usage_store.build_flow(
        kafka_source(settings, EVENTS, linger=linger),
        kafka_source(settings, DEAD_LETTERS, linger=linger, with_headers=True),
        ClickHouseUsageStore(
            _clickhouse(settings), settings.clickhouse_database, on_retry=_counted("ClickHouse, usage")
        ),
        load_rate_card(settings.rate_card),
    )


def _ledger(settings: Settings) -> Dataflow:
    client = redis_client(settings)
    epoch = expected_epoch(settings, client)
    clickhouse = _clickhouse(settings)
    journal = ClickHouseJournal(
        clickhouse, settings.clickhouse_database, on_retry=_counted("ClickHouse, ledger")
    )
    keeper = RedisOutbox(
        client,
        epoch,
        settings.outbox_retention_s,
        settings.outbox_max_entries,
        _counted("Redis, note what is stored"),
    )
    # What the ledger has, Redis must have had: otherwise it came back without its end, and would number anew.
    archive = ClickHouseArchive(clickhouse, settings.clickhouse_database, load_rate_card(None), EVENTS, "")
    if (newest := archive.newest_epoch()) > epoch:
        raise BooksDiffer(
            f"Redis is at epoch {epoch} but the ledger at {newest}: an older Redis came back. "
            "Run `metering rebuild-balances`"
        )
    number, at_ms = archive.last_entry()
    keeper.check_reached(number)
    source = OutboxSource(client, heals, Continuity(number, at_ms), keeper.condemn)
    return flows.ledger.build_flow(source, journal, keeper)


def _alerts(settings: Settings) -> Dataflow:
    client = redis_client(settings)
    expected_epoch(settings, client)
    on_retry = _counted("Redis, note which alerts are sent")

    def after() -> bytes:
        sent = retrying(lambda: client.get(ALERTS_SENT), heals=heals, on_retry=on_retry)
        return sent or b"0-0"  # type: ignore[return-value]

    def note(entry_id: bytes) -> None:
        retrying(lambda: client.set(ALERTS_SENT, entry_id), heals=heals, on_retry=on_retry)

    def refuse(problem: str) -> NoReturn:
        raise WrongRedis(problem)

    producer = ConfirmedProducer(settings.kafka, ALERTS, _counted("Kafka, alerts"))
    return flows.alerts.build_flow(
        OutboxSource(client, heals, None, refuse, after),
        lambda messages: producer.send([Outgoing(key, value) for key, value in messages]),
        note,
    )


def _write_off(settings: Settings) -> Dataflow:
    return flows.write_off.build_flow(
        PeriodSource(now_ms, settings.write_off_interval_s * 1000),
        lambda period_ms: run_period(settings, period_ms, say),
    )


def kafka_source(
    settings: Settings,
    topic: str,
    *,
    progress: Progress | None = None,
    with_headers: bool = False,
    linger: timedelta = timedelta(0),
    reread: bool = False,
    on_missing_head: Callable[[str, int, int], None] | None = None,
) -> KafkaSource:
    """A topic as these settings say. Raises CommandError when its messages are not stamped by the broker."""
    source = KafkaSource(
        settings.kafka,
        topic,
        now_ms,
        broker_append_time=settings.broker_append_time,
        progress=progress,
        with_headers=with_headers,
        linger=linger,
        reread=reread,
        on_missing_head=on_missing_head,
        on_retry=_counted(f"Kafka, read {topic}"),
    )
    if settings.broker_append_time:
        # The source looks at the messages too: a broker may say so and not do it.
        require_append_time(AdminClient({"bootstrap.servers": settings.kafka}), topic)
    return source


def _clickhouse(settings: Settings) -> Client:
    return clickhouse_client(settings)


def _counted(effect: str) -> Callable[[Exception], None]:
    """Counts attempts that failed, and says so when the trouble begins and then once in a while."""
    said_at = 0.0

    def on_retry(error: Exception) -> None:
        nonlocal said_at
        metrics.RETRIES.labels(effect).inc()
        if time.monotonic() - said_at > 10:
            said_at = time.monotonic()
            # Kafka's exceptions hold an error that says more than they do.
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            say(f"{effect}: trying again: {one_line(reason)}")

    return on_retry


def _built(build: Callable[[Settings], Dataflow]) -> Dataflow:
    sys.excepthook = _explain
    # What is imported stays; what comes is mostly freed by counting references, so that looking for cycles in
    # a large state is worth doing seldom.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        settings = load_settings()
        if settings.metrics_port:
            start_http_server(settings.metrics_port)
        flow = build(settings)
    except (CommandError, SettingsError, WrongLog, WrongRedis) as error:
        _refuse(str(error))
    except redis.RedisError as error:
        _refuse(f"METERING_REDIS: {one_line(str(error))}")
    except KafkaException as error:
        _refuse(f"METERING_KAFKA: {one_line(error.args[0].str())}")
    except ClickHouseError as error:
        _refuse(f"METERING_CLICKHOUSE: {one_line(str(error))[:300]}")
    ready = os.environ.get("METERING_READY_FILE")
    if ready:
        Path(ready).touch()
    return flow


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for what is known to go wrong while a flow runs; Bytewax wraps it into errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, WrongLog):
            return  # It was said where it was found.
        if isinstance(cause, (WrongRedis, StoreRefused)):
            say(str(cause))
            return
        cause = cause.__cause__ or cause.__context__
    sys.__excepthook__(kind, error, trace)


def _refuse(line: str) -> NoReturn:
    say(line)
    raise SystemExit(1)
