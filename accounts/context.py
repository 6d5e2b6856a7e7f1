"""What every part of the domain works with, built once by `app` and by tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from accounts.attempts import DEFAULT_LIMITS, AttemptCounter, Guarded, Limit
from accounts.database import Database
from accounts.passwords import Argon2Parameters, Passwords
from accounts.secrets import Secrets
from accounts.tokens import AccessTokens


@dataclass(frozen=True)
class AccountsConfig:
    """What may be chosen; the defaults are those of the settings."""

    access_token_s: int = 600
    refresh_token_s: int = 2_592_000
    """A log-in lives as long after its last refresh."""
    login_max_s: int = 7_776_000
    """After that somebody has to give the password again, however often was refreshed."""
    argon2: Argon2Parameters = field(default_factory=Argon2Parameters)
    command_wait_s: float = 5.0
    limits: dict[Guarded, Limit] = field(default_factory=lambda: dict(DEFAULT_LIMITS))


class Accounts:
    """Database, keys and clock. Opens nothing until the first use; safe to share between threads."""

    def __init__(
        self, database: Database, secrets: Secrets, config: AccountsConfig, now_ms: Callable[[], int]
    ) -> None:
        self.database = database
        self.secrets = secrets
        self.config = config
        self.now_ms = now_ms
        self.passwords = Passwords(config.argon2)
        self.tokens = AccessTokens(database, secrets, config.access_token_s)
        self.attempts = AttemptCounter(database, secrets, config.limits)
