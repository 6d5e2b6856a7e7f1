"""Ids that look like the real ones: ULIDs for what happens, short codes for what stays."""

from __future__ import annotations

from random import Random

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]


def ulid(time_ms: int, rng: Random) -> str:
    """26 characters: 48 bits of time in ms, then 80 random bits, in Crockford's base 32."""
    number = (time_ms << 80) | rng.getrandbits(80)
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])


def short_code(rng: Random, length: int) -> str:
    """`length` random characters of the same alphabet."""
    return "".join([_ALPHABET[rng.getrandbits(5)] for _ in range(length)])


def distinct_codes(prefix: str, count: int, length: int, rng: Random) -> list[str]:
    """`count` different codes, each after the prefix."""
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes[prefix + short_code(rng, length)] = None
    return list(codes)
