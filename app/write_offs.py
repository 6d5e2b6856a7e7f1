"""Write-offs on the real servers: drives the procedure of `metering.write_off`, on a timer and on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import redis
from clickhouse_connect.driver.exceptions import ClickHouseError
from confluent_kafka import KafkaException
from sqlalchemy.exc import SQLAlchemyError

from app.accounts_service import open_write_off_accounts
from app.clients import clickhouse_client, redis_client
from app.errors import CommandError
from app.repair.resettle import failure
from app.steps import drive
from metering.money import user_account
from metering.ports import WrongRedis
from metering.write_off import Run, Step, Transfer, command_of, write_off
from schemas.rate_card import load_rate_card
from schemas.settings import Settings, one_line
from schemas.topics import COMMANDS, EVENTS
from sinks.kafka import ConfirmedProducer, NotDelivered, Outgoing
from sources.archive import ClickHouseArchive
from sources.balances import RedisCredit
from sources.timer import period_start_ms
from telemetry import faults, metrics

LOOK_EVERY_S = 0.2
AGAIN_AFTER_S = 10.0

FAULTS = {
    Step.PLANNED: faults.WRITE_OFF_PLANNED,
    Step.SENT: faults.WRITE_OFF_SENT,
    Step.CLOSED_ONE: faults.WRITE_OFF_CLOSED_ONE,
}


class WriteOffFailed(CommandError):
    """A server that a run needs did not answer; one line. The next run goes on where this one stopped."""


def run_write_off(settings: Settings, period_ms: int, *, patience_s: float = 60.0) -> Run:
    """One run; see `metering.write_off`. `patience_s` is how long to wait for the ledger to have all transfers:
    what is still open then is closed by the next run. Raises WriteOffFailed."""
    deadline = time.monotonic() + patience_s
    try:
        credit = RedisCredit(redis_client(settings))
        archive = ClickHouseArchive(
            clickhouse_client(settings), settings.clickhouse_database, load_rate_card(None), EVENTS, ""
        )
        producer = ConfirmedProducer(settings.kafka, COMMANDS)

        def send(transfers: Sequence[Transfer]) -> None:
            producer.send(
                [
                    Outgoing(
                        user_account(transfer.user_id).encode(),
                        command_of(transfer).model_dump_json(exclude_none=True).encode(),
                    )
                    for transfer in transfers
                ]
            )

        def credits(node_ids: Sequence[str]) -> Mapping[str, int]:
            return credit.credits(node_ids)

        steps = write_off(
            period_ms,
            open_write_off_accounts(settings),
            credit.debts,
            credits,
            send,
            archive.results,
            tired_of_waiting=lambda: time.monotonic() > deadline,
        )
        return drive(steps, FAULTS, _wait)
    except SQLAlchemyError as error:
        raise WriteOffFailed(f"METERING_ACCOUNTS_DATABASE: {one_line(str(error))[:300]}") from error
    except (redis.RedisError, ClickHouseError, KafkaException, NotDelivered, WrongRedis) as error:
        raise WriteOffFailed(str(failure(settings, error))) from error


def run_period(settings: Settings, period_ms: int, say: Callable[[str], None]) -> None:
    """What the flow does in a period: a run, and again while a server is away, until the next period begins."""
    length_ms = settings.write_off_interval_s * 1000
    while True:
        try:
            done = run_write_off(settings, period_ms)
        except CommandError as problem:
            metrics.WRITE_OFF_RUNS.labels("failed").inc()
            say(f"write-off put off: {problem}")
            time.sleep(AGAIN_AFTER_S)
            if period_start_ms(time.time_ns() // 1_000_000, length_ms) > period_ms:
                return
        else:
            metrics.WRITE_OFF_RUNS.labels("complete" if not done.open else "open").inc()
            metrics.WRITTEN_OFF_US.inc(done.moved_us)
            if done.closed or done.open:
                say(
                    f"write-off: {done.closed} transfers closed, {done.moved_us} us moved, "
                    f"{done.open} still open"
                )
            return


def _wait(step: Step) -> None:
    if step is Step.WAITING:
        time.sleep(LOOK_EVERY_S)
