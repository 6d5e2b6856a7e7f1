"""The load of a round: what nodes, schedulers and operators would send, and what a network makes of it.

Events are generated a minute or two at a time (`app.workload`) with times just behind the clock, and reach the
broker twice, out of order, minutes late, broken, with no key or a wrong one. Money commands come in between, some
twice, some in conflict with themselves. What was sent is remembered only as digests: the bill is made from the
broker's log.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from heapq import heappop, heappush
from random import Random

from confluent_kafka import KafkaError, Message, Producer

from app.emit import message_key
from app.money_commands import top_up_message
from app.workload import TransportEffects, WorkloadSpec, generate
from schemas.decode import decode_event
from schemas.events import Usage
from schemas.rejections import Rejected
from schemas.topics import COMMANDS, EVENTS
from sinks.kafka import producer_settings

CHUNK_MINUTES = 2
BEHIND_MS = 45_000
"""How far the event times of a chunk lie behind the clock at its start: none of them is in the future."""
NO_KEY_SHARE = 0.03
WRONG_KEY_SHARE = 0.03
COMMAND_EVERY = 150
"""Events between two money commands."""
DELIVERY_TIMEOUT_MS = 900_000
"""Longer than any outage here: what a producer holds while the broker is away is not given up."""
FLUSH_S = 120.0
DIGEST_BYTES = 12
ANY_PARTITION = -1
"""The key decides."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One message on its way."""

    topic: str
    key: bytes | None
    value: bytes
    partition: int | None = None


@dataclass(frozen=True)
class LoadShape:
    """How much, and how badly carried. Shares are of the events."""

    rate_per_s: int = 150
    held_back_share: float = 0.0
    """Sent up to `held_back_s` seconds later."""
    held_back_s: float = 0.0


def parcels(seed: str, shape: LoadShape, now_ms: int) -> Iterator[Parcel]:
    """Without end: chunk after chunk, each made when it is due. `now_ms` is when the first one is sent."""
    rng = Random(f"{seed}/parcels")
    held: list[tuple[int, int, Parcel]] = []
    numbers = itertools.count()
    for chunk in itertools.count():
        start_ms = now_ms + chunk * CHUNK_MINUTES * 60_000 - BEHIND_MS
        spec = WorkloadSpec(
            seed=Random(f"{seed}/chunk/{chunk}").getrandbits(48),
            start_ms=start_ms,
            events=shape.rate_per_s * CHUNK_MINUTES * 60,
            minutes=CHUNK_MINUTES,
            users=200,
            transport=TransportEffects(duplicates=0.08, disorder=0.2, junk=0.005),
        )
        for line in generate(spec):
            number = next(numbers)
            while held and held[0][0] <= number:
                yield heappop(held)[2]
            parcel = Parcel(EVENTS, _key(line, rng), line)
            if rng.random() < shape.held_back_share:
                due = number + int(rng.uniform(0, shape.held_back_s) * shape.rate_per_s)
                heappush(held, (due, next(numbers), parcel))
            else:
                yield parcel
            if number % COMMAND_EVERY == 0:
                yield from _commands(line, f"{seed}/{number}", rng)


def _key(line: bytes, rng: Random) -> bytes | None:
    chance = rng.random()
    if chance < NO_KEY_SHARE:
        return None
    if chance < NO_KEY_SHARE + WRONG_KEY_SHARE:
        return f"room/nobody-{rng.randrange(8)}".encode()
    return message_key(line)


def _commands(line: bytes, name: str, rng: Random) -> Iterator[Parcel]:
    """A top-up for whoever the line is about; now and then a repeat, or a request id used for something else."""
    try:
        event = decode_event(line)
    except Rejected:
        return
    if not isinstance(event, Usage):
        return
    account = f"user/{event.user_id}"
    request = sha256(name.encode()).hexdigest()[:24]

    def top_up(amount_us: int) -> Parcel:
        message, _ = top_up_message(
            account, amount_us, request_id=request, reason="chaos", actor="chaos", now_ms=event.time_ms
        )
        return Parcel(COMMANDS, account.encode(), message)

    amount_us = rng.randrange(1, 600_000_000)
    yield top_up(amount_us)
    if rng.random() < 0.3:
        yield top_up(amount_us)
    if rng.random() < 0.2:
        yield top_up(amount_us + 1)


class Sender:
    """Sends parcels from a thread at their pace, until told to stop; `send` adds others from any thread.

    A message counts as sent once the broker has acknowledged it; until then it is sent again, as a producer in
    earnest would.
    """

    def __init__(self, bootstrap: str, *, quick_reconnect: bool) -> None:
        settings = {**producer_settings(bootstrap), "message.timeout.ms": DELIVERY_TIMEOUT_MS, "log_level": 0}
        # The default reaches ten seconds. Probes shall measure the system, not that; but in an outage it is the
        # point that nodes deliver what they hold only some time after everybody else is back.
        pauses_ms = (50, 500) if quick_reconnect else (5_000, 10_000)
        settings |= {"reconnect.backoff.ms": pauses_ms[0], "reconnect.backoff.max.ms": pauses_ms[1]}
        self._producer = Producer(settings)
        self._lock = threading.Lock()
        self._failed: list[Parcel] = []
        self.acknowledged: dict[str, set[bytes]] = {EVENTS: set(), COMMANDS: set()}
        """Digests of what the broker has confirmed, by topic."""
        self.sent = 0
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, stream: Iterator[Parcel], rate_per_s: int) -> None:
        """Begin to send the stream."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(stream, rate_per_s), daemon=True)
        self._thread.start()

    def _run(self, stream: Iterator[Parcel], rate_per_s: int) -> None:
        started = time.monotonic()
        try:
            for number, parcel in enumerate(stream):
                while (ahead_s := number / rate_per_s - (time.monotonic() - started)) > 0:
                    if self._stop.is_set():
                        return
                    self._producer.poll(min(ahead_s, 0.05))
                if self._stop.is_set():
                    return
                self.send(parcel)
        except BaseException as problem:
            self.problem = problem

    def send(self, parcel: Parcel) -> None:
        """Hand one parcel to the producer; blocks only while its queue is full."""
        self.sent += 1
        while True:
            try:
                self._producer.produce(
                    parcel.topic,
                    value=parcel.value,
                    key=parcel.key,
                    on_delivery=lambda error, _message: self._delivered(parcel, error, _message),
                    partition=ANY_PARTITION if parcel.partition is None else parcel.partition,
                )
                break
            except BufferError:
                self._producer.poll(0.1)
        self._producer.poll(0)

    def _delivered(self, parcel: Parcel, error: KafkaError | None, _message: Message) -> None:
        with self._lock:
            if error is None:
                self.acknowledged[parcel.topic].add(digest(parcel.value))
            else:
                self._failed.append(parcel)

    def stop(self) -> None:
        """Stop the stream and wait until everything that was sent is acknowledged. Raises RuntimeError."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.problem is not None:
            raise RuntimeError(f"the load broke off: {self.problem!r}") from self.problem
        deadline = time.monotonic() + FLUSH_S
        while True:
            left = self._producer.flush(5)
            with self._lock:
                failed, self._failed = self._failed, []
            for parcel in failed:
                self.send(parcel)
            if not left and not failed:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{left + len(failed)} messages are not acknowledged")


def digest(value: bytes) -> bytes:
    """Short enough to remember all of them."""
    return sha256(value).digest()[:DIGEST_BYTES]
