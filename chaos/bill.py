"""What must come out: the broker's log, read back whole and settled by the pure function.

The log is read in the order that decides which occurrence of an identity counts, (partition, offset). Of money
commands with one request id the first counts, which is why all of them are keyed by account.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from app.repair.log_ends import TopicEnds
from metering.cells import cell_id
from metering.commands import counter_account
from metering.settle import Settling
from schemas.commands import CommandKind
from schemas.decode import check_append_time, decode_command, decode_event
from schemas.events import Usage
from schemas.rate_card import RateCard
from schemas.rejections import Rejected, RejectReason
from sources.kafka import consumer_settings
from telemetry.quiet import KAFKA_LOGGER

READ_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Logged:
    """A message as it lies in the log."""

    partition: int
    offset: int
    value: bytes
    appended_at_ms: int


class WriteOff(NamedTuple):
    """A user's debt that a node was asked to pay."""

    account: str
    node_account: str
    most_us: int


@dataclass
class Bill:
    """What every store must agree with. Amounts in us; zeros are left out."""

    by_cell: dict[tuple[str, str], int] = field(default_factory=dict)
    """(cell id, account) -> change."""
    by_request: dict[tuple[str, str], int] = field(default_factory=dict)
    """(request id, account) -> change."""
    usage_events: int = 0
    """Usage that counts."""
    cost_us: int = 0
    write_offs: dict[str, WriteOff] = field(default_factory=dict)
    """By request id. How much they move depends on when they are carried out: the ledger says it."""
    refused: frozenset[tuple[int, int]] = frozenset()
    """(partition, offset) of the events that no order of reading makes acceptable."""

    def with_write_offs(self, moved_us: Mapping[str, int]) -> Bill:
        """With what write-offs moved, as far as that is possible; what is not stands as planned, and so differs."""
        by_request = dict(self.by_request)
        for request_id, asked in self.write_offs.items():
            moved = moved_us.get(request_id, asked.most_us)
            amount_us = min(max(moved, 0), asked.most_us)
            by_request[request_id, asked.account] = amount_us
            by_request[request_id, asked.node_account] = -amount_us
        return replace(self, by_request=by_request)

    def balances(self) -> dict[str, int]:
        """What every account must hold."""
        balances: defaultdict[str, int] = defaultdict(int)
        for (_, account), amount_us in (*self.by_cell.items(), *self.by_request.items()):
            balances[account] += amount_us
        return dict(balances)


class LogReader:
    """Reads a topic on, from where it was, to its end."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self.messages: dict[int, list[Logged]] = {partition: [] for partition in range(partitions)}
        self._next = dict.fromkeys(range(partitions), 0)

    def read_on(self) -> None:
        """Blocks until the end that the log has now. Raises KafkaException."""
        consumer = Consumer(consumer_settings(self._bootstrap), logger=KAFKA_LOGGER)
        try:
            for partition, (_, end) in TopicEnds(self._bootstrap, self._topic).spans().items():
                start = self._next[partition]
                if end > start:
                    self._read_partition(consumer, TopicPartition(self._topic, partition, start), end)
        finally:
            consumer.close()

    def _read_partition(self, consumer: Consumer, place: TopicPartition, end: int) -> None:
        consumer.assign([place])
        into = self.messages[place.partition]
        while (left := end - self._next[place.partition]) > 0:
            # It waits until it has that many, so it may not ask for more than there are.
            polled = consumer.consume(num_messages=min(left, 10_000), timeout=READ_TIMEOUT_S)
            if not polled:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"reading {place.topic} stalled"))
            for message in polled:
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        continue
                    raise KafkaException(error)
                offset = message.offset() or 0
                into.append(Logged(place.partition, offset, message.value() or b"", message.timestamp()[1]))
                self._next[place.partition] = offset + 1
        consumer.unassign()

    def in_order(self) -> Iterable[Logged]:
        """By (partition, offset)."""
        for partition in sorted(self.messages):
            yield from self.messages[partition]


def bill_of(
    events: Iterable[Logged], commands: Iterable[Logged], card: RateCard, broker_append_time: bool
) -> Bill:
    """Settle everything that was ever logged."""
    settling = Settling(card)
    bill = Bill()
    refused = set()
    for logged in events:
        try:
            event = decode_event(logged.value)
            if broker_append_time:
                check_append_time(event.time_ms, logged.appended_at_ms)
            bill.usage_events += settling.add(event) and isinstance(event, Usage)
        except Rejected as rejected:
            # Which occurrence of a conflict is refused depends on what was read first: it is a matter of labels.
            if rejected.reason is not RejectReason.IDENTITY_CONFLICT:
                refused.add((logged.partition, logged.offset))
    bill.refused = frozenset(refused)
    for scope, start, vector, _ in settling.vectors():
        cell = cell_id(scope, start)
        for account, amount_us in vector.items():
            if account.startswith("user/"):
                bill.cost_us -= amount_us
            if amount_us:
                bill.by_cell[cell, account] = amount_us
    _carry_out(commands, bill)
    return bill


def _carry_out(commands: Iterable[Logged], bill: Bill) -> None:
    taken = set()
    for logged in commands:
        try:
            command = decode_command(logged.value)
        except Rejected:
            continue
        if command.request_id in taken:
            continue
        taken.add(command.request_id)
        if command.kind is CommandKind.WRITE_OFF:
            node = counter_account(command)
            bill.write_offs[command.request_id] = WriteOff(command.account, node, command.amount_us)
            continue
        bill.by_request[command.request_id, command.account] = command.amount_us
        bill.by_request[command.request_id, counter_account(command)] = -command.amount_us
