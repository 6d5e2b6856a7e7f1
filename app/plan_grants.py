"""Gives subscribers the minutes that their plans include in the period that lies now; `metering.plans` says how."""

from __future__ import annotations

from confluent_kafka import KafkaException
from sqlalchemy.exc import SQLAlchemyError

from accounts.plans import Subscriptions
from app.accounts_service import clear_failures, now_ms, open_database
from app.errors import CommandError
from metering.plans import included_minutes
from schemas.plans import load_plans
from schemas.settings import Settings, one_line
from schemas.topics import COMMANDS
from sinks.kafka import ConfirmedProducer, NotDelivered, Outgoing

SUBSCRIBERS_AT_ONCE = 1_000


def issue_plans(settings: Settings) -> int:
    """Issue what is due; how many grants. Raises CommandError, one line, when a server is away: the next turn goes
    on with whoever is left."""
    issued = 0
    try:
        for plan in load_plans(settings.plans).values():
            with clear_failures():
                subscriptions = Subscriptions(open_database(settings), now_ms)
                period_ms, _ = plan.period.around(now_ms())
                producer = ConfirmedProducer(settings.kafka, COMMANDS)
                while due := subscriptions.not_issued(plan.name, period_ms, SUBSCRIBERS_AT_ONCE):
                    grants = [included_minutes(plan, each.user_id, period_ms)[1] for each in due]
                    producer.send(
                        [
                            Outgoing(
                                grant.data.account.encode(), grant.model_dump_json(exclude_none=True).encode()
                            )
                            for grant in grants
                        ]
                    )
                    subscriptions.note_issued(due, period_ms)
                    issued += len(due)
    except SQLAlchemyError as error:
        raise CommandError(f"METERING_ACCOUNTS_DATABASE: {one_line(str(error))[:300]}") from error
    except (KafkaException, NotDelivered) as error:
        raise CommandError(f"METERING_KAFKA={settings.kafka}: {one_line(str(error))}") from error
    return issued
