"""What this package refuses, and why. The API turns each into a problem; nothing here knows HTTP."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why something was refused; the words are also the last part of a problem's `type`."""

    BAD_CREDENTIALS = "bad-credentials"
    BAD_TOKEN = "bad-token"
    REFRESH_REUSED = "refresh-reused"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    USERNAME_TAKEN = "username-taken"
    NODE_ID_TAKEN = "node-id-taken"
    WEAK_PASSWORD = "weak-password"
    WRONG_CODE = "wrong-code"
    ALREADY_BOUND = "already-bound"
    WRONG_ORDER = "wrong-order"
    TOO_MANY = "too-many"
    TOO_MANY_ATTEMPTS = "too-many-attempts"
    REQUEST_CONFLICT = "request-conflict"
    INSUFFICIENT_CREDIT = "insufficient-credit"
    OVER_LIMIT = "over-limit"
    BALANCES_AWAY = "balances-away"
    ARCHIVE_AWAY = "archive-away"
    COMMANDS_AWAY = "commands-away"
    BAD_CURSOR = "bad-cursor"
    DATABASE_UNFIT = "database-unfit"


class Refused(Exception):
    """One refusal. `detail` is a sentence for people and never repeats a secret."""

    def __init__(self, reason: Reason, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


class DatabaseUnfit(Exception):
    """The database is not one that this program can go on with; one line, to be shown as it is."""
