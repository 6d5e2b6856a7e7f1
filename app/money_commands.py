"""Money commands as the operator's tools send them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from app.errors import CommandError
from metering.money import US_PER_MINUTE
from schemas.commands import GRANTED_TYPE, MAX_AMOUNT_US, TOPPED_UP_TYPE
from schemas.decode import decode_command
from schemas.rejections import Rejected
from schemas.rfc3339 import format_rfc3339_ms


def amount_us_of(minutes: str) -> int:
    """Service microseconds of a decimal number of minutes. CommandError when they are no whole number."""
    try:
        amount_us = Decimal(minutes) * US_PER_MINUTE
    except ArithmeticError:
        raise CommandError(f"{minutes!r} is no number of minutes", exit_code=2) from None
    if not amount_us.is_finite() or abs(amount_us) > MAX_AMOUNT_US:
        raise CommandError(f"{minutes!r} minutes are no amount of a single command", exit_code=2)
    if amount_us != int(amount_us):
        raise CommandError(f"{minutes!r} minutes are not a whole number of microseconds", exit_code=2)
    return int(amount_us)


def top_up_message(
    account: str, amount_us: int, *, request_id: str | None, reason: str, actor: str, now_ms: int
) -> tuple[bytes, str]:
    """The message and its request id, a new one unless given.

    Raises CommandError, exit code 2, for what the settlement flow would refuse.
    """
    told = {"account": account, "amount_us": amount_us, "reason": reason, "actor": actor}
    return _message(TOPPED_UP_TYPE, told, request_id, now_ms, "top-up")


def grant_message(
    account: str,
    amount_us: int,
    *,
    priority: int,
    effective_from: str,
    expires_at: str,
    request_id: str | None,
    reason: str,
    actor: str,
    now_ms: int,
) -> tuple[bytes, str]:
    """As `top_up_message`, of minutes that are spent first and expire. Instants are RFC 3339."""
    told: dict[str, object] = {"account": account, "amount_us": amount_us, "reason": reason, "actor": actor}
    told |= {"priority": priority, "effective_from": effective_from, "expires_at": expires_at}
    return _message(GRANTED_TYPE, told, request_id, now_ms, "grant")


def _message(
    type_name: str, data: Mapping[str, object], request_id: str | None, now_ms: int, what: str
) -> tuple[bytes, str]:
    request = request_id or str(uuid.uuid4())
    message = msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": request,
            "source": "cli/metering",
            "type": type_name,
            "subject": data["account"],
            "time": format_rfc3339_ms(now_ms),
            "data": {**data, "request_id": request},
        }
    )
    try:
        decode_command(message)
    except Rejected as refusal:
        raise CommandError(f"this {what} would be refused: {refusal}", exit_code=2) from None
    return message, request
