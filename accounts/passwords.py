"""Passwords: argon2id, with the parameters of the day.

A hash that was made with other parameters still verifies, and is made anew at the next log-in. Each
computation takes `memory_kib` of memory; no more than `PARALLEL` run at once in a process, so that a crowd at
the log-in costs time and not all of the memory.
"""

from __future__ import annotations

import threading
import unicodedata
from dataclasses import dataclass

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

MIN_CHARACTERS = 10
MAX_CHARACTERS = 128
PARALLEL = 4


@dataclass(frozen=True)
class Argon2Parameters:
    """The cost of one hash; the defaults are RFC 9106's second choice."""

    time_cost: int = 3
    memory_kib: int = 65_536
    parallelism: int = 4


class Passwords:
    """Makes and checks hashes. Blocks for as long as one takes; safe to share between threads."""

    def __init__(self, parameters: Argon2Parameters) -> None:
        self._hasher = PasswordHasher(
            time_cost=parameters.time_cost,
            memory_cost=parameters.memory_kib,
            parallelism=parameters.parallelism,
            type=Type.ID,
        )
        self._places = threading.Semaphore(PARALLEL)
        self._nobodys = self.hash("nobody has this password")

    def hash(self, password: str) -> str:
        """A salted hash, with its parameters."""
        with self._places:
            return self._hasher.hash(_normal(password))

    def verify(self, password: str, hashed: str | None) -> bool:
        """Whether it is the password. Without a hash (an unknown user) it does the same work and says no."""
        with self._places:
            try:
                return self._hasher.verify(hashed or self._nobodys, _normal(password)) and hashed is not None
            except (VerificationError, InvalidHashError):
                return False

    def outdated(self, hashed: str) -> bool:
        """Whether it was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(hashed)


def weakness(password: str, *names: str) -> str | None:
    """Why a password is refused, or None. Length is what counts; `names` are those that an attacker tries first."""
    text = _normal(password)
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return f"must have {MIN_CHARACTERS} to {MAX_CHARACTERS} characters"
    if len(set(text)) < 4:
        return "must have at least 4 different characters"
    if text.casefold() in {_normal(name).casefold() for name in names}:
        return "must not be the username or the e-mail address"
    return None


def _normal(password: str) -> str:
    # The same key strokes give other bytes on other systems.
    return unicodedata.normalize("NFKC", password)
