"""What producers say: events of a few rooms and sessions, with everything that goes wrong on the way to the log."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

import msgspec

from schemas.decode import FUTURE_TOLERANCE_MS
from schemas.rfc3339 import format_rfc3339_ms

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Habits:
    """How the producers of one seed behave: shares of events."""

    rooms: int
    sessions: int
    users: int
    late: float
    """Minutes to days behind."""
    wrong_clock: float
    """Ahead of the broker: within the tolerance, at its edge, or past it."""
    repeats: float
    conflicts: float
    """The id of an earlier event with another body."""
    wrong_keys: float
    """On any partition instead of the scope's own."""
    membership: float
    spread_ms: int
    """How far behind the broker's clock an ordinary event's time lies, at most."""

    @classmethod
    def draw(cls, chance: Random) -> Habits:
        """Some seeds know no trouble of a kind at all, others plenty of it."""

        def share(most: float) -> float:
            return chance.choice([0.0, 0.0, most / 4, most])

        return cls(
            rooms=chance.randint(0, 3),
            sessions=chance.randint(0, 2),
            users=chance.randint(1, 5),
            late=share(0.3),
            wrong_clock=share(0.2),
            repeats=share(0.4),
            conflicts=share(0.15),
            wrong_keys=chance.choice([0.0, 0.3, 1.0, 1.0]),
            membership=chance.choice([0.1, 0.3, 0.6]),
            spread_ms=chance.choice([1_000, 90_000, 10 * MINUTE_MS]),
        )


class Producers:
    """Makes events one at a time, as bytes with the partition that they go to."""

    def __init__(self, chance: Random, habits: Habits) -> None:
        self._chance = chance
        self._habits = habits
        self._scopes = [f"room/r-{n}" for n in range(habits.rooms)]
        self._scopes += [f"session/s-{n}" for n in range(habits.sessions)] or ["session/s-0"]
        self._number = 0
        self._sent: list[tuple[str, bytes]] = []
        self._ids: dict[str, list[str]] = {}
        self._conflicting: set[tuple[str, str]] = set()

    def next(self, now_ms: int, partitions: int) -> tuple[int, bytes, bytes]:
        """(partition, key, value) of the next message."""
        chance, habits = self._chance, self._habits
        if self._sent and chance.random() < habits.repeats:
            scope, value = chance.choice(self._sent)
        else:
            scope = chance.choice(self._scopes)
            value = self._event(scope, self._time_ms(now_ms))
            self._sent.append((scope, value))
        partition = crc32(scope.encode()) % partitions
        if chance.random() < habits.wrong_keys:
            partition = chance.randrange(partitions)
        return partition, scope.encode(), value

    @property
    def conflicting_scopes(self) -> set[str]:
        """Scopes of which an id was used twice."""
        return {scope for scope, _ in self._conflicting}

    def forget_conflicts(self) -> None:
        """Repeat nothing of an id that was used twice: in a new log positions begin anew, and of two occurrences
        with equal positions nobody can say which is the smaller."""
        taken = {f'"id":"{event_id}"'.encode() for _, event_id in self._conflicting}
        self._sent = [
            (scope, value) for scope, value in self._sent if not any(mark in value for mark in taken)
        ]
        self._ids.clear()

    def _time_ms(self, now_ms: int) -> int:
        chance, habits = self._chance, self._habits
        roll = chance.random()
        if roll < habits.late:
            return now_ms - chance.choice(
                [
                    chance.randrange(5 * MINUTE_MS),
                    chance.randrange(HOUR_MS),
                    chance.randrange(6 * HOUR_MS),
                    chance.randrange(3 * 24 * HOUR_MS),
                ]
            )
        if roll < habits.late + habits.wrong_clock:
            return now_ms + chance.choice(
                [
                    chance.randrange(FUTURE_TOLERANCE_MS),
                    FUTURE_TOLERANCE_MS,
                    FUTURE_TOLERANCE_MS + 1,
                    HOUR_MS,
                ]
            )
        time_ms = now_ms - chance.randrange(habits.spread_ms)
        if chance.random() < 0.1:
            time_ms -= time_ms % MINUTE_MS + chance.choice([0, 1])
        return time_ms

    def _event(self, scope: str, time_ms: int) -> bytes:
        chance, habits = self._chance, self._habits
        known = self._ids.setdefault(scope, [])
        if known and chance.random() < habits.conflicts:
            event_id = chance.choice(known)
            self._conflicting.add((scope, event_id))
        else:
            self._number += 1
            event_id = f"e-{self._number}"
            known.append(event_id)
        kind, _, name = scope.partition("/")
        user = f"u-{chance.randrange(habits.users)}"
        if chance.random() >= habits.membership:
            return self._usage(kind, name, event_id, time_ms, user)
        if kind == "room":
            what = chance.choices(["room.joined", "room.left", "room.closed"], [6, 3, 1])[0]
            data = {"room_id": name, "user_id": user}
        else:
            what = chance.choice(["session.started", "session.ended"])
            data = {"session_id": name, "user_id": user}
        return _envelope(f"lingua.{what}.v1", event_id, time_ms, data)

    def _usage(self, kind: str, name: str, event_id: str, time_ms: int, user: str) -> bytes:
        chance = self._chance
        asr, nmt, tts = (chance.randrange(1000) for _ in range(3))
        data = {
            "session_id": name if kind == "session" else f"s-{user}",
            "user_id": user,
            "node_id": f"n-{chance.randrange(2)}",
            "utterance_id": event_id,
            "asr_time_ms": asr,
            "nmt_time_ms": nmt,
            "tts_time_ms": tts,
            "gpu_active_time_ms": chance.randint(0, asr + nmt + tts),
        }
        if kind == "room":
            data["room_id"] = name
        return _envelope("lingua.usage.utterance.v1", event_id, time_ms, data)


class Tellers:
    """Makes money commands, some of them twice, some with another body."""

    def __init__(self, chance: Random, users: int) -> None:
        self._chance = chance
        self._users = users
        self._number = 0
        self._sent: list[bytes] = []

    def next(self, now_ms: int) -> bytes:
        """The next command, as bytes."""
        chance = self._chance
        if self._sent and chance.random() < 0.25:
            return chance.choice(self._sent)
        if self._number and chance.random() < 0.1:
            request = f"q-{chance.randrange(self._number)}"
        else:
            request = f"q-{self._number}"
            self._number += 1
        what = chance.choice(["topped_up", "adjusted", "written_off", "granted"])
        user = f"user/u-{chance.randrange(self._users)}"
        data: dict[str, object] = {
            "account": user,
            "amount_us": chance.randint(1, 2_000_000),
            "request_id": request,
            "reason": "simulated",
            "actor": "simulation",
        }
        if what == "adjusted":
            data["amount_us"] = chance.choice([-1, 1]) * chance.randint(1, 500_000)
        node = f"node/n-{chance.randrange(2)}"
        if what == "written_off":
            data["node_account"] = node
        if what == "topped_up" and chance.random() < 0.3:
            data["paid_by"] = node
        if what == "granted":
            from_ms = now_ms + chance.randint(-10, 10) * MINUTE_MS
            data["priority"] = chance.randrange(3)
            data["effective_from"] = format_rfc3339_ms(from_ms)
            data["expires_at"] = format_rfc3339_ms(from_ms + chance.choice([1, 10, 60]) * MINUTE_MS)
        value = _envelope(f"lingua.account.{what}.v1", f"c-{request}", now_ms - 1, data)
        self._sent.append(value)
        return value


def _envelope(kind: str, event_id: str, time_ms: int, data: object) -> bytes:
    return _encode(
        {
            "specversion": "1.0",
            "id": event_id,
            "source": "simulation",
            "type": kind,
            "time": format_rfc3339_ms(time_ms),
            "data": data,
        }
    )
