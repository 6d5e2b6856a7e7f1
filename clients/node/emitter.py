"""The usage emitter: what a node's inference code calls.

The order of effects, and what a crash between any two of them does:

1. The event gets its id, its time and its bytes in the caller's thread, and is put into a queue in memory.
   A kill now loses it: at most what was emitted within the last `flush_interval_s` and one write.
2. A thread takes all that is queued and stores it in the spool, with one write and one sync a batch. From here
   on the event is sent, with the same bytes, by this process or by the next one on the same directory.
3. Another thread sends what is stored, in order, and waits for the broker's acknowledgement.
4. The position in the spool moves. A kill before that sends the batch again; metering drops repeats.

Nothing the caller does waits for the disk or the network (but `durable=True`, `flush` and `close`). What cannot
be kept is refused, the newest first, since the older ones are promised already: counted, logged, and handed to
`on_refused`. Nothing is dropped silently.

After a fork the child cannot use the emitter: its threads are not there. It makes one of its own, on another
directory. A process that ends by an unhandled SIGTERM runs no clean-up: to Python that is a kill.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from . import events
from .sender import Sender, producer_settings
from .spool import Record, Spool, encode_record
from .utterance import Utterance

EVENTS_TOPIC = "lingua.events"
SPOOL_BYTES = 256 * 1024 * 1024
QUEUE_BYTES = 8 * 1024 * 1024
FLUSH_INTERVAL_S = 0.02
STALL_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 5.0
DURABLE_TIMEOUT_S = 10.0

_MIN_SPOOL_BYTES = 64 * 1024
_RECORD_OVERHEAD_BYTES = 64
_LOG_INTERVAL_S = 10.0
_CLOSE_GRACE_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0

_logger = logging.getLogger("clients.node")


class RefusalReason(StrEnum):
    """Why an event was not taken, or not delivered."""

    QUEUE_FULL = "queue_full"
    """More than `queue_bytes` wait for the disk: it is slow, or it fails."""
    SPOOL_FULL = "spool_full"
    """Spool and queue together have reached `spool_bytes`: the broker is away for too long."""
    CLOSED = "closed"
    """The utterance ended after the emitter was closed, or the disk failed until then."""
    SET_ASIDE = "set_aside"
    """The broker will never take it, or its bytes were damaged on the disk; see `aside.jsonl`."""


@dataclass(frozen=True)
class Refusal:
    """An event that will not be delivered. `value` is the whole event, `key` its scope; of a damaged one
    they are empty."""

    reason: RefusalReason
    detail: str
    key: bytes
    value: bytes


class NotDurable(RuntimeError):
    """An event that should be on the disk by now is not: it was refused, or the disk takes too long."""


@dataclass(frozen=True)
class EmitterStats:
    """One look at an emitter. Counters begin at zero with the emitter."""

    emitted: int
    """Events that were taken."""
    refused: Mapping[RefusalReason, int]
    """Events that were not, or that the broker will never take."""
    queued: int
    """Events in memory, not on the disk yet."""
    queued_bytes: int
    spooled: int
    """Events on the disk that the broker has not acknowledged."""
    spooled_bytes: int
    """What the spool takes on the disk. A segment that is sent in part counts whole."""
    recovered: int
    """Events that an earlier process left in the spool."""
    sent: int
    """Events that the broker acknowledged to this process."""
    set_aside: int
    """Events that the broker refused for good."""
    damaged: int
    """Records that were damaged on the disk and set aside."""
    torn_bytes: int
    """Half a record that the last process was writing when it died; set aside, too."""
    oldest_age_s: float
    """Age of the oldest event that is not acknowledged; 0 if there is none."""
    flushes: int
    """Batches that were stored."""
    longest_flush_s: float
    """The longest time from taking a batch out of memory until it was on the disk."""
    disk_errors: int
    """Writes to the spool that failed and were repeated."""
    gpu_errors: int
    """Utterances without GPU time because the counter failed or went back."""
    callback_errors: int
    """Times that `on_refused` raised."""
    producers_made: int
    """How often a connection to the broker was begun anew."""
    last_error: str
    """What the broker or the disk last complained about; it may be long over."""
    clock_ahead_ms: int | None
    """How far events were ahead of the broker's clock when it took them, if it tells. Metering refuses what is
    300 000 ms ahead."""


@dataclass(slots=True)
class _Queued:
    made_ms: int
    key: bytes
    value: bytes
    stored: threading.Event | None

    @property
    def size(self) -> int:
        return len(self.key) + len(self.value) + _RECORD_OVERHEAD_BYTES


class UsageEmitter:
    """Emits a node's usage and lifecycle events to Kafka, by way of a spool on the disk.

        emitter = UsageEmitter("kafka:9092", node_id="n-17", spool=Path("/var/lib/node/usage"))
        with emitter.utterance(session_id="s-1", user_id="u-5", room_id="r-9", source_lang="zh") as utterance:
            with utterance.asr():
                ...

    One emitter a process, one directory an emitter; any number of threads. Made, it starts two threads and
    sends what an earlier process left. It does not wait for the broker.

    `spool_bytes` bounds disk and memory together (64 KiB at least), `queue_bytes` the memory; `kafka` has
    further settings of librdkafka (TLS, SASL); `gpu` reads a counter of active GPU ms that only grows, and is
    called twice an utterance, so it must be quick; `on_refused` is called with each event that is lost to
    Kafka, from any thread, and should be quick, too. `clock_ns` is the wall clock and `timer_ns` the stop watch.

    Raises ValueError or TypeError for an argument, SpoolInUse when another process has the directory, OSError
    when the directory cannot be used.
    """

    def __init__(
        self,
        brokers: str,
        node_id: str,
        spool: Path | str,
        *,
        topic: str = EVENTS_TOPIC,
        spool_bytes: int = SPOOL_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        flush_interval_s: float = FLUSH_INTERVAL_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        exit_timeout_s: float = EXIT_TIMEOUT_S,
        kafka: Mapping[str, object] | None = None,
        gpu: Callable[[], float] | None = None,
        on_refused: Callable[[Refusal], None] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        timer_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if not brokers:
            raise ValueError("brokers: must name at least one host:port")
        if spool_bytes < _MIN_SPOOL_BYTES:
            raise ValueError(f"spool_bytes: must be at least {_MIN_SPOOL_BYTES}, not {spool_bytes}")
        if queue_bytes <= 0:
            raise ValueError(f"queue_bytes: must be more than 0, not {queue_bytes}")
        if not 0 <= flush_interval_s <= 60:
            raise ValueError(f"flush_interval_s: must be 0 to 60, not {flush_interval_s}")
        if stall_timeout_s <= 0:
            raise ValueError(f"stall_timeout_s: must be more than 0, not {stall_timeout_s}")
        self._node_id = events.checked_id("node_id", node_id)
        # A wrong name among them is for the caller to see, not for a thread.
        producer_settings(brokers, kafka or {})
        self._source = f"node/{node_id}"
        self._spool_bytes = spool_bytes
        self._queue_bytes = queue_bytes
        self._flush_interval_s = flush_interval_s
        self._exit_timeout_s = exit_timeout_s
        self._gpu = gpu
        self._on_refused = on_refused
        self._clock_ns = clock_ns
        self._timer_ns = timer_ns

        self._mutex = threading.Lock()
        self._ids = events.EventIds()
        self._queue: deque[_Queued] = deque()
        self._taken: list[_Queued] = []
        """Out of the queue, not on the disk yet. The storing thread alone changes it."""
        self._queued_bytes = 0
        """Of the queue and of what was taken out."""
        self._closed = False
        self._forked = False
        self._refused: Counter[RefusalReason] = Counter()
        self._emitted = self._flushes = self._disk_errors = self._gpu_errors = self._callback_errors = 0
        self._longest_flush_s = 0.0
        self._disk_error = ""
        self._last_logged_s: float | None = None
        self._unlogged = 0
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._storing_ends_s: float | None = None

        self._spool = Spool(Path(spool), spool_bytes)
        self._sender = Sender(
            self._spool, brokers, topic, kafka or {}, stall_timeout_s, self._now_ms, self._note_set_aside
        )
        # Daemons: a program that forgets to close still ends. `atexit` closes before they stop.
        self._storing = threading.Thread(target=self._store_until_closed, name="usage-spool", daemon=True)
        self._sending = threading.Thread(target=self._sender.run, name="usage-sender", daemon=True)
        self._storing.start()
        self._sending.start()
        _open_emitters.add(self)

    def utterance(
        self,
        *,
        session_id: str,
        user_id: str,
        room_id: str | None = None,
        utterance_id: str | None = None,
        audio_ms: int | None = None,
        source_lang: str | None = None,
        target_lang: str | None = None,
        gpu: Callable[[], float] | None = None,
        durable: bool = False,
        durable_timeout_s: float = DURABLE_TIMEOUT_S,
    ) -> Utterance:
        """One utterance, as a context manager; leaving its block emits the event, with that moment as its time.

        Leaving does not wait and does not raise, but with `durable`: then it waits until the event is on the
        disk, and raises NotDurable when it is not after `durable_timeout_s` (it may still be sent). Without
        `utterance_id` it is `ut-` and the event's id. Raises TypeError or ValueError for a wrong field,
        RuntimeError when the emitter is closed.
        """
        self._check_open()
        ids: dict[str, str | int | None] = {
            "session_id": events.checked_id("session_id", session_id),
            "room_id": None if room_id is None else events.checked_id("room_id", room_id),
            "user_id": events.checked_id("user_id", user_id),
            "node_id": self._node_id,
            "utterance_id": None if utterance_id is None else events.checked_id("utterance_id", utterance_id),
        }
        scope = events.scope_of(session_id, room_id)

        def finish(utterance: Utterance, measured: dict[str, int | str | None], failed: bool) -> None:
            if utterance.gpu_counter_failed:
                self._gpu_errors += 1
            self._emit(events.USAGE, scope, ids | measured, durable, durable_timeout_s, may_raise=not failed)

        return Utterance(self._timer_ns, finish, gpu or self._gpu, audio_ms, source_lang, target_lang)

    def session_started(
        self, *, session_id: str, user_id: str, room_id: str | None = None, durable: bool = False
    ) -> None:
        """A session began now, in a room if one is named.

        Like all lifecycle events it does not wait, but with `durable`, and raises as `utterance` does.
        """
        self._session(events.SESSION_STARTED, session_id, user_id, room_id, durable)

    def session_ended(
        self, *, session_id: str, user_id: str, room_id: str | None = None, durable: bool = False
    ) -> None:
        """A session ended now."""
        self._session(events.SESSION_ENDED, session_id, user_id, room_id, durable)

    def room_joined(self, *, room_id: str, user_id: str, durable: bool = False) -> None:
        """A user came into a room, or is still there; from now on the user pays a share of it."""
        self._room(events.ROOM_JOINED, room_id, user_id, durable)

    def room_left(self, *, room_id: str, user_id: str, durable: bool = False) -> None:
        """A user left a room now."""
        self._room(events.ROOM_LEFT, room_id, user_id, durable)

    def room_closed(self, *, room_id: str, durable: bool = False) -> None:
        """A room was closed now, for everybody in it."""
        self._room(events.ROOM_CLOSED, room_id, None, durable)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was emitted is acknowledged (or set aside); False when the time is over first."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._mutex:
                # In this order: a batch is counted by the spool before it leaves the queue's count.
                waiting = self._queued_bytes or self._spool.events
            if not waiting:
                return True
            if time.monotonic() >= deadline_s:
                return False
            self._hurry.set()
            self._wake.set()
            time.sleep(0.002)

    def stats(self) -> EmitterStats:
        """Counters and gauges, at once; they may be a batch apart from each other."""
        sender, spool = self._sender, self._spool
        with self._mutex:
            queued = len(self._queue) + len(self._taken)
            first = next(iter(self._taken or self._queue), None)
            sending_ms = sender.oldest_ms if spool.events else None
            oldest_ms = [ms for ms in (sending_ms, first.made_ms if first else None) if ms is not None]
            return EmitterStats(
                emitted=self._emitted,
                refused=dict(self._refused),
                queued=queued,
                queued_bytes=self._queued_bytes,
                spooled=spool.events,
                spooled_bytes=spool.disk_bytes,
                recovered=spool.recovered,
                sent=sender.sent,
                set_aside=sender.set_aside,
                damaged=sender.damaged,
                torn_bytes=spool.torn_bytes,
                oldest_age_s=max(0, self._now_ms() - min(oldest_ms)) / 1000 if oldest_ms else 0.0,
                flushes=self._flushes,
                longest_flush_s=self._longest_flush_s,
                disk_errors=self._disk_errors,
                gpu_errors=self._gpu_errors,
                callback_errors=self._callback_errors,
                producers_made=sender.producers_made,
                last_error=self._disk_error or sender.last_error,
                clock_ahead_ms=sender.clock_ahead_ms,
            )

    def close(self, timeout_s: float = EXIT_TIMEOUT_S) -> bool:
        """Take nothing more, store what is queued, send for up to `timeout_s`, and give the directory free.

        True if everything is acknowledged; what is not stays in the spool for the next process. Closing twice
        is harmless. An utterance that ends later is refused as `closed`.
        """
        with self._mutex:
            if self._closed or self._forked:
                return self._spool.events == 0
            self._closed = True
        deadline_s = time.monotonic() + timeout_s
        self._storing_ends_s = deadline_s
        self._hurry.set()
        self._wake.set()
        _open_emitters.discard(self)
        # The disk first: what is stored is safe, however the sending ends.
        self._storing.join(timeout_s + _CLOSE_GRACE_S)
        self._sender.stop_at(deadline_s)
        self._sending.join(max(0.0, deadline_s - time.monotonic()) + _CLOSE_GRACE_S)
        if self._storing.is_alive() or self._sending.is_alive():
            # A disk that does not even fail. The lock stays until the process ends, as the threads do.
            _logger.error("the emitter's threads do not end; the spool stays locked")
            return False
        self._spool.close()
        return self._spool.events == 0

    def __enter__(self) -> UsageEmitter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(self._exit_timeout_s)

    def _session(self, kind: str, session_id: str, user_id: str, room_id: str | None, durable: bool) -> None:
        self._check_open()
        data: dict[str, str | int | None] = {
            "session_id": events.checked_id("session_id", session_id),
            "user_id": events.checked_id("user_id", user_id),
            "room_id": None if room_id is None else events.checked_id("room_id", room_id),
        }
        self._emit(kind, events.scope_of(session_id, room_id), data, durable)

    def _room(self, kind: str, room_id: str, user_id: str | None, durable: bool) -> None:
        self._check_open()
        data: dict[str, str | int | None] = {
            "room_id": events.checked_id("room_id", room_id),
            "user_id": None if user_id is None else events.checked_id("user_id", user_id),
        }
        self._emit(kind, events.scope_of(None, room_id), data, durable)

    def _emit(
        self,
        kind: str,
        scope: str,
        data: dict[str, str | int | None],
        durable: bool,
        durable_timeout_s: float = DURABLE_TIMEOUT_S,
        may_raise: bool = True,
    ) -> None:
        stored = threading.Event() if durable else None
        key = scope.encode()
        with self._mutex:
            # One lock for id, time and place in the queue, so that all three have the same order.
            now_ms = self._now_ms()
            event_id = self._ids.next(now_ms)
            if kind == events.USAGE and data["utterance_id"] is None:
                data["utterance_id"] = f"ut-{event_id}"
            value = events.encode(kind, event_id, self._source, scope, now_ms, data)
            queued = _Queued(now_ms, key, value, stored)
            reason = self._reason_to_refuse(queued.size)
            if reason is None:
                self._queue.append(queued)
                self._queued_bytes += queued.size
                self._emitted += 1
        if reason is not None:
            self._refuse(Refusal(reason, "", key, value))
            if durable and may_raise:
                raise NotDurable(f"{scope}: refused, {reason}")
            return
        if stored is not None:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()
        if stored is not None and not stored.wait(durable_timeout_s) and may_raise:
            raise NotDurable(f"{scope}: not on the disk after {durable_timeout_s:g} s; it may still be sent")

    def _reason_to_refuse(self, size: int) -> RefusalReason | None:
        if self._closed or self._forked:
            return RefusalReason.CLOSED
        if self._queued_bytes + self._spool.disk_bytes + size > self._spool_bytes:
            return RefusalReason.SPOOL_FULL
        if self._queued_bytes + size > self._queue_bytes:
            return RefusalReason.QUEUE_FULL
        return None

    def _refuse(self, refusal: Refusal) -> None:
        with self._mutex:
            self._refused[refusal.reason] += 1
            self._unlogged += 1
            now_s = time.monotonic()
            # The first at once, then their number: a full spool refuses every utterance.
            log = self._last_logged_s is None or now_s - self._last_logged_s >= _LOG_INTERVAL_S
            if log:
                count, self._unlogged, self._last_logged_s = self._unlogged, 0, now_s
        if log:
            _logger.error("usage is lost to metering: %d refused, the last one: %s", count, refusal.reason)
        if self._on_refused is not None:
            try:
                self._on_refused(refusal)
            except Exception:
                self._callback_errors += 1
                _logger.exception("on_refused raised")

    def _note_set_aside(self, detail: str, record: Record) -> None:
        self._refuse(Refusal(RefusalReason.SET_ASIDE, detail, record.key, record.value))

    def _store_until_closed(self) -> None:
        """The storing thread: gather for a moment, store, again; the last time after `close`."""
        pause_s = _FIRST_PAUSE_S
        while True:
            self._wake.wait()
            if not self._closed:
                self._hurry.wait(self._flush_interval_s)
            self._hurry.clear()
            self._wake.clear()
            closing = self._closed
            with self._mutex:
                self._taken += self._queue
                self._queue.clear()
            try:
                self._store()
                pause_s = _FIRST_PAUSE_S
                self._disk_error = ""
            except Exception as problem:
                self._disk_errors += 1
                self._disk_error = f"{type(problem).__name__}: {problem}"
                _logger.error("the spool cannot be written, it is tried again: %s", problem)
                if closing and time.monotonic() + pause_s >= (self._storing_ends_s or 0):
                    self._give_up()
                    return
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                self._wake.set()
                continue
            if closing:
                return

    def _store(self) -> None:
        taken = self._taken
        if not taken:
            return
        started_s = time.monotonic()
        self._spool.append([encode_record(each.made_ms, each.key, each.value) for each in taken])
        size = sum(each.size for each in taken)
        with self._mutex:
            # Only now: until the spool counts them, they count here.
            self._queued_bytes -= size
            self._taken = []
            self._flushes += 1
            self._longest_flush_s = max(self._longest_flush_s, time.monotonic() - started_s)
        self._sender.work.set()
        for each in taken:
            if each.stored is not None:
                each.stored.set()

    def _give_up(self) -> None:
        """The disk failed until the end: what is in memory is lost, and everybody is told."""
        with self._mutex:
            lost, self._taken, self._queued_bytes = self._taken, [], 0
        for each in lost:
            self._refuse(Refusal(RefusalReason.CLOSED, self._disk_error, each.key, each.value))

    def _now_ms(self) -> int:
        return self._clock_ns() // 1_000_000

    def _check_open(self) -> None:
        if self._forked:
            raise RuntimeError("this emitter belongs to the parent process: after a fork make another one")
        if self._closed:
            raise RuntimeError("the emitter is closed")

    def _forget_parent(self) -> None:
        """In the child of a fork: no threads, and no hold on the parent's lock."""
        self._forked = True
        # Kafka's client must not be taken down here: it would wait for threads that only the parent has.
        _parents.append(self)
        # The fork may have happened while another thread had the lock.
        self._mutex = threading.Lock()
        self._spool.close()


_open_emitters: weakref.WeakSet[UsageEmitter] = weakref.WeakSet()
_parents: list[UsageEmitter] = []


def _close_all() -> None:
    for emitter in list(_open_emitters):
        emitter.close(emitter._exit_timeout_s)


def _after_fork() -> None:
    for emitter in list(_open_emitters):
        emitter._forget_parent()
    _open_emitters.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
