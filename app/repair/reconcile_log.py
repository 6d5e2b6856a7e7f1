"""The log against the usage store and the dead letters, message by message, in bounded memory.

The store is sorted by scope, the log by time. So the log is read once, each accepted event is noted in 52 bytes
in a temporary file by ranges of scopes, and then range after range is compared with what the
store shows for it. Refused messages are looked up among the dead letters as they are read.

What must hold, up to the offsets of the cut:

- The identity of every accepted event is in the store, at this position or a smaller one (of several
  occurrences the smallest counts); at this position with this very body.
- An occurrence that is not the one that counts says the same (a duplicate), or is among the dead letters with its
  own bytes (a conflict). A conflict whose window, or that of the event it contradicts, was frozen already has no
  letter: settlement has forgotten the ids by then. It is counted as `late conflicts without a letter`, and is no
  drift, since it moves no money.
- Every refused message is among the dead letters, with its own bytes.
- The store has no event in these offsets that the log has not, unless it still has those of an older log.
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from app.errors import CommandError
from app.repair.spool import ScopeSpool
from flows.intake import accept_batch
from metering.cells import window_start_ms
from metering.identity import partition_and_offset, position
from metering.reconcile import Comparison
from schemas.messages import RawMessage
from schemas.rate_card import RateCard
from schemas.rejections import RejectReason
from schemas.settings import Settings
from schemas.topics import EVENTS
from sources.archive_checks import ArchiveChecks, StoredEvent, body_number, half_md5, identity_number
from sources.kafka import consumer_settings
from telemetry.quiet import KAFKA_LOGGER

MESSAGES_AT_ONCE = 20_000
SILENCE_S = 30.0
LETTERS_AT_ONCE = 10_000
PARTITION_UNASSIGNED = -1
"""Of what the client reports about brokers."""
LETTERS_MISSING_AT_MOST = 200_000
"""How many messages without a letter are asked for again; bounds memory when all of them are gone."""
LOOK_EVERY_S = 0.5
APPEND_SLACK_MS = 300_000
"""How much later than its append time an event may have been settled and still count as late by the fence."""

# identity, position, body, window start (ms), digest of the bytes, append time (ms), whether there is a value
_NOTE = struct.Struct("<QQQqQqI")


class _Note(NamedTuple):
    identity: int
    position: int
    body: int
    window_start_ms: int
    value: int
    appended_at_ms: int
    has_value: int


class _Unlettered(NamedTuple):
    """A message that must be among the dead letters."""

    value: int | None
    appended_at_ms: int
    conflict: bool
    window_start_ms: int
    """The smaller one of its window and that of the event that it contradicts."""


def check_log_against_store(
    settings: Settings,
    archive: ArchiveChecks,
    card: RateCard,
    spans: Mapping[int, tuple[int, int]],
    settled_ms: Callable[[], Mapping[int, int]],
    only_log: bool,
    patience_s: float,
    messages: Comparison,
) -> None:
    """Compare; what is found goes to `messages`. `only_log` says that the store has events of no other log;
    `settled_ms` tells up to which append time settlement has come, by partition. Raises KafkaException,
    ClickHouse's errors, and CommandError when the head of the log is deleted meanwhile."""
    ranges = list(archive.scope_ranges_of())
    with ScopeSpool(ranges) as spool:
        check = _Check(archive, settled_ms, patience_s, messages, settings.broker_append_time)
        for batch, created_ms in read_log(settings, spans):
            accepted, refused = accept_batch(batch, card)
            messages.checked += len(batch)
            messages.count("messages", len(batch))
            messages.count("accepted", len(accepted))
            messages.count("refused", len(refused))
            for located in accepted:
                event, message = located.event, located.message
                spool.add(
                    event.scope.encode(),
                    _NOTE.pack(
                        identity_number(event),
                        position(message.partition, message.offset),
                        body_number(event),
                        window_start_ms(event.time_ms),
                        half_md5(message.value or b""),
                        created_ms[message.offset],
                        message.value is not None,
                    ),
                )
            check.refused([message for message, _ in refused], created_ms)
        for number, scopes in enumerate(ranges):
            check.events(_notes(spool, number), archive.counting_events(scopes), spans if only_log else {})
        check.finish()
        messages.count("dead letters", archive.count_letters(spans))
        for figure in ("duplicates", "conflicts", "late conflicts without a letter"):
            messages.count(figure, 0)


def _notes(spool: ScopeSpool, number: int) -> Iterator[_Note]:
    for records in spool.pieces(number):
        for values in _NOTE.iter_unpack(records):
            yield _Note(*values)


class _Check:
    def __init__(
        self,
        archive: ArchiveChecks,
        settled_ms: Callable[[], Mapping[int, int]],
        patience_s: float,
        messages: Comparison,
        broker_append_time: bool,
    ) -> None:
        self._archive = archive
        self._settled_ms = settled_ms
        self._patience_s = patience_s
        self._messages = messages
        self._broker_append_time = broker_append_time
        self._missing: dict[int, _Unlettered] = {}
        self._overflow = 0

    def refused(self, messages: list[RawMessage], created_ms: Mapping[int, int]) -> None:
        """These must be dead letters."""
        self._look_for_letters(
            {
                position(message.partition, message.offset): _Unlettered(
                    None if message.value is None else half_md5(message.value),
                    created_ms[message.offset],
                    False,
                    0,
                )
                for message in messages
            }
        )

    def events(
        self,
        notes: Iterator[_Note],
        stored: dict[int, StoredEvent],
        spans: Mapping[int, tuple[int, int]],
    ) -> None:
        """One range of scopes: accepted events of the log against the events that count in the store."""
        met: set[int] = set()
        letters: dict[int, _Unlettered] = {}
        absent: dict[int, _Note] = {}
        for note in notes:
            found = stored.get(note.identity)
            at = None if found is None else position(found.partition, found.offset)
            if found is None or at is None or at > note.position:
                absent[note.position] = note
            elif at == note.position:
                met.add(note.identity)
                if found.body != note.body:
                    self._messages.differs("stored with another body", _name(at), found.body, note.body)
            elif found.body == note.body:
                self._messages.count("duplicates")
            else:
                self._messages.count("conflicts")
                letters[note.position] = _Unlettered(
                    note.value if note.has_value else None,
                    note.appended_at_ms,
                    True,
                    min(note.window_start_ms, found.window_start_ms),
                )
        self._report_absent(absent)
        self._look_for_letters(letters)
        for identity, event in stored.items():
            first, next_ = spans.get(event.partition, (0, 0))
            if identity not in met and first <= event.offset < next_:
                at = position(event.partition, event.offset)
                self._messages.differs("in the store, not in the log", _name(at), "event", None)

    def _report_absent(self, absent: dict[int, _Note]) -> None:
        """Without append times of the broker each flow goes by its own clock: what it found to lie in the future
        may not lie there any more."""
        if absent and not self._broker_append_time:
            found = self._archive.letters(_by_partition(absent))
            for partition, offset in found:
                letter = found[partition, offset]
                note = absent[position(partition, offset)]
                if letter.reason == RejectReason.IN_FUTURE and letter.value == note.value:
                    del absent[note.position]
        for at in sorted(absent):
            self._messages.differs("missing in the store", _name(at), None, "event")

    def _look_for_letters(self, wanted: dict[int, _Unlettered]) -> None:
        for at in self._without_letter(wanted):
            if len(self._missing) < LETTERS_MISSING_AT_MOST:
                self._missing[at] = wanted[at]
            else:
                self._overflow += 1

    def _without_letter(self, wanted: dict[int, _Unlettered]) -> list[int]:
        missing = []
        places = sorted(wanted)
        for first in range(0, len(places), LETTERS_AT_ONCE):
            part = places[first : first + LETTERS_AT_ONCE]
            found = self._archive.letters(_by_partition(part))
            for at in part:
                letter = found.get(partition_and_offset(at))
                if letter is None:
                    missing.append(at)
                elif letter.value != wanted[at].value:
                    self._messages.differs(
                        "dead letter with other bytes", _name(at), letter.value, wanted[at].value
                    )
        return missing

    def finish(self) -> None:
        """Wait for the letters that are under way, then say which are missing."""
        self._set_late_conflicts_aside()
        deadline = time.monotonic() + self._patience_s
        while self._missing and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            left = self._without_letter(self._missing)
            self._missing = {at: self._missing[at] for at in left}
        settled_ms = self._settled_ms()
        for at, letter in sorted(self._missing.items()):
            partition, _ = partition_and_offset(at)
            kind = (
                "no dead letter for a conflict" if letter.conflict else "no dead letter for a refused message"
            )
            if settled_ms.get(partition, 0) > letter.appended_at_ms:
                self._messages.differs(kind, _name(at), None, "dead letter")
            else:
                self._messages.leave_open(f"{kind}, and settlement may not have come so far")
        if self._overflow:
            self._messages.leave_open("dead letters that are missing, too many to ask again", self._overflow)

    def _set_late_conflicts_aside(self) -> None:
        conflicts = [(at, letter) for at, letter in self._missing.items() if letter.conflict]
        for first in range(0, len(conflicts), LETTERS_AT_ONCE):
            part = conflicts[first : first + LETTERS_AT_ONCE]
            fences = self._archive.fences_at([letter.appended_at_ms + APPEND_SLACK_MS for _, letter in part])
            for (at, letter), fence_ms in zip(part, fences, strict=True):
                if letter.window_start_ms < fence_ms:
                    self._messages.count("late conflicts without a letter")
                    del self._missing[at]


def _by_partition(places: Iterable[int]) -> dict[int, list[int]]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for at in places:
        partition, offset = partition_and_offset(at)
        found[partition].append(offset)
    return found


def _name(at: int) -> str:
    partition, offset = partition_and_offset(at)
    return f"{EVENTS}/{partition}@{offset}"


def read_log(
    settings: Settings, spans: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[list[RawMessage], dict[int, int]]]:
    """The messages of the spans, partition after partition, in batches of one partition; with the time stamp of
    each offset (ms). `appended_at_ms` is the time to judge a message by: the broker's, or now."""
    consumer = Consumer(consumer_settings(settings.kafka), logger=KAFKA_LOGGER)
    try:
        for partition, (first, end) in sorted(spans.items()):
            next_offset = first
            heard_at = time.monotonic()
            if first < end:
                consumer.assign([TopicPartition(EVENTS, partition, first)])
            while next_offset < end:
                polled = consumer.consume(num_messages=MESSAGES_AT_ONCE, timeout=0.2)
                batch: list[RawMessage] = []
                created_ms: dict[int, int] = {}
                for message in polled:
                    if message.partition() not in (partition, PARTITION_UNASSIGNED):
                        # Still on its way when the partition before was done.
                        continue
                    if _is_message(message):
                        offset = message.offset() or 0
                        next_offset = max(next_offset, offset + 1)
                        if offset < end:
                            created_ms[offset] = message.timestamp()[1]
                            batch.append(_raw(message, partition, settings.broker_append_time))
                    elif _at_end(message):
                        next_offset = max(next_offset, message.offset() or 0)
                if batch:
                    heard_at = time.monotonic()
                    yield batch, created_ms
                elif time.monotonic() - heard_at > SILENCE_S:
                    raise KafkaException(
                        KafkaError(
                            KafkaError._TIMED_OUT, f"{EVENTS}/{partition} is silent at offset {next_offset}"
                        )
                    )
    finally:
        consumer.close()


def _is_message(message: Message) -> bool:
    error = message.error()
    if error is None:
        return True
    code = error.code()
    if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
        raise CommandError("the head of the log was deleted while it was read: start again")
    if code != KafkaError._PARTITION_EOF and not error.retriable():
        raise KafkaException(error)
    return False


def _at_end(message: Message) -> bool:
    error = message.error()
    return error is not None and error.code() == KafkaError._PARTITION_EOF


def _raw(message: Message, partition: int, broker_append_time: bool) -> RawMessage:
    at_ms = message.timestamp()[1] if broker_append_time else time.time_ns() // 1_000_000
    return RawMessage(EVENTS, partition, message.offset() or 0, message.key(), message.value(), at_ms)
