"""The 8-character security code, by which a user lets a node bind itself.

How it is kept. Its owner must be able to read it again, so a one-way hash alone will not do; and with 31^8
(8.5e11, just under 2^40) codes any unkeyed hash of it is searched through in minutes. So the database has two
things: a MAC under a key outside the database, unique, by which a code is found; and the code sealed
(AES-256-GCM) for its owner. A copy of the database without the secret gives neither the codes nor a way to
try one.

Comparing in constant time. A guess is turned into its MAC first, and the index is searched for that. What the
search takes depends on a value that the guesser cannot choose or foresee, so its timing tells nothing of
other codes; the row that is found is compared once more with `hmac.compare_digest`.
"""

from __future__ import annotations

import secrets as random
import unicodedata

ALPHABET = "ABCDEFGHJKMNPQRSTUVWXYZ23456789"
"""31 characters; without 0 and O, 1, I and L, which people mistake for each other."""
LENGTH = 8

MAC_PURPOSE = "security code"
SEAL_PURPOSE = "security code"

_DASHES = "-‐‑‒–— \t"


def new_code() -> str:
    """A code from the system's random numbers."""
    return "".join(random.choice(ALPHABET) for _ in range(LENGTH))


def canonical(entered: str) -> str | None:
    """The code that somebody meant: without spaces and dashes, in capitals. None when it can be no code."""
    text = unicodedata.normalize("NFKC", entered).upper()
    text = "".join(character for character in text if character not in _DASHES)
    if len(text) != LENGTH or any(character not in ALPHABET for character in text):
        return None
    return text
