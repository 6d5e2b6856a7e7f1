"""Plans: each period, every subscriber gets a grant of the included minutes.

A grant of a period is named by plan, period and user, and so is its request id: whoever issues it again issues the
same one, and it is carried out once. What a plan says when the period's grant is issued first is what counts
for it. Order of effects: the command is in the log, then the subscription is noted as issued for this period. A
crash in between issues the same grant again, to no effect.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from metering.money import user_account
from schemas.commands import GRANTED_TYPE, GrantData, Granted
from schemas.plans import Plan
from schemas.rfc3339 import format_rfc3339_ms

SOURCE = "lingua/plans"
ACTOR = "system/plans"


class Subscription(NamedTuple):
    """A user's plan, and the start (ms) of the last period that was issued; 0 before the first."""

    user_id: str
    plan: str
    issued_period_ms: int


def grant_id(plan: Plan, user_id: str, period_start_ms: int) -> str:
    """The same for the same plan, period and user. Ids may be long: what stands for the user's is not."""
    whom = blake2b(user_id.encode(), digest_size=16).hexdigest()
    return f"plan:{plan.name}:{period_start_ms}:{whom}"


def included_minutes(plan: Plan, user_id: str, now_ms: int) -> tuple[int, Granted]:
    """The start (ms) of the period that lies now, and the command that gives its minutes. They pay for windows
    of the whole period, and expire with it."""
    start_ms, end_ms = plan.period.around(now_ms)
    request_id = grant_id(plan, user_id, start_ms)
    return start_ms, Granted(
        specversion="1.0",
        id=request_id,
        source=SOURCE,
        type=GRANTED_TYPE,
        time=format_rfc3339_ms(start_ms),
        data=GrantData(
            account=user_account(user_id),
            amount_us=plan.amount_us,
            request_id=request_id,
            reason=f"plan {plan.name}",
            actor=ACTOR,
            priority=plan.priority,
            effective_from=format_rfc3339_ms(start_ms),
            expires_at=format_rfc3339_ms(end_ms),
        ),
    )
