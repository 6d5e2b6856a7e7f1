"""Live settlement of one scope: the state machine that the settlement flow wires up.

Laws:
- State is a function of the set of events seen, of where each one stood in the log, and of the fence. The
  order of arrival, the cut into batches, and repeats change nothing.
- Every emission carries a cell's whole vector and a revision: the sum over partitions of (offset of the
  scope's last event there + 1), on top of the log's own base. It only grows along the log, and a log that was
  adopted later has the higher base. Whoever keeps the balances posts the difference
  to what it had for the cell, if the revision is higher, and else answers OLDER.
- An emission answered OLDER leaves its cell dirty: it goes out again with the next higher revision. After a
  restart every live cell is dirty, since nobody knows which answers were lost.
- Windows that start before the fence are frozen: their cells and ids are forgotten, their events are LATE.
  A late membership event still counts for the windows above the fence.
- Of several occurrences of an identity the one with the smallest (partition, offset) counts, also when it
  comes last: then the one that had counted is taken back (DISPLACED).
- The clock decides only when something is written, never what.

An entry is kept for every event of a live window (64 bytes packed for usage): enough to know a repeat, to
take the event back, and to price it again. A snapshot packs a window once and copies it from then on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

import msgspec

from metering.cells import WINDOW_MS, cell_id, cell_vector, is_room, window_start_ms
from metering.identity import body_digest, identity_digest, position
from metering.money import REVENUE
from metering.presence import PRESENCE_MAX_MS, Presence
from metering.pricing import gpu_credit_us, stages_cost_us
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.messages import RawMessage
from schemas.rate_card import RateCard, RateVersion
from schemas.records import SettlementReason

_IDENTITY_BYTES = 16
_BODY_BYTES = 8
# body digest, position, time, asr, nmt, tts, gpu (all ms), index of the user, index of the node
_USAGE = struct.Struct(f"<{_BODY_BYTES}sQqIIIIII")
# body digest, position, time (ms), kind, index of the user + 1 (0: nobody)
_LIFECYCLE = struct.Struct(f"<{_BODY_BYTES}sQqBI")
_POSITION_AND_TIME = struct.Struct("<Qq")


class Located(msgspec.Struct, frozen=True, gc=False):
    """An accepted event and the message that it came in: where it stands in the log, and its bytes."""

    event: Event
    message: RawMessage


class Outcome(IntEnum):
    """What became of an event."""

    APPLIED = 1
    DUPLICATE = 2
    CONFLICT = 3
    """This occurrence is refused: another one with a smaller position counts and says otherwise."""
    DISPLACED = 4
    """This occurrence counts from now on; the one at `LiveScope.displaced` is refused in its place."""
    LATE = 5


class Answer(IntEnum):
    """What became of a posting."""

    POSTED = 1
    OLDER = 2
    FROZEN = 3
    OVER_LIMIT = 4
    """The cell moves more than MAX_AMOUNT_US, or a balance would leave its range."""


class CellPosting(msgspec.Struct, frozen=True, gc=False):
    """A cell's whole vector at a revision; `amounts` has every account but platform/revenue."""

    cell_id: str
    window_start_ms: int
    revision: int
    amounts: dict[str, int]
    rate_version: str


class Ending(msgspec.Struct, frozen=True, gc=False):
    """A scope came to its end, as far as is known at `revision`."""

    reason: SettlementReason
    first_event_ms: int
    last_event_ms: int
    revision: int


class Emission(msgspec.Struct, frozen=True, gc=False):
    """What a scope has to post now. `appended_at_ms` lists the usage that it brings to the balances."""

    scope: str
    cells: list[CellPosting]
    ending: Ending | None
    appended_at_ms: list[int]


class Displaced(msgspec.Struct, frozen=True, gc=False):
    """An occurrence that counted until one with a smaller position came; its bytes are in the log."""

    partition: int
    offset: int


class _SavedScope(msgspec.Struct, array_like=True):
    """A snapshot. New fields go to the end, with a default, so that older snapshots still load."""

    scope: str
    positions: dict[int, int]
    frozen_before_ms: int
    windows: list[bytes]
    joins_below: dict[str, int]
    ends_below: dict[str, int]
    closed_below: int | None
    first_event_ms: int | None
    last_event_ms: int
    end_ms: int | None
    open: bool


class _SavedWindow(msgspec.Struct, array_like=True):
    start_ms: int
    users: list[str]
    nodes: list[str]
    usage: bytes
    lifecycle: bytes
    had_usage: bool


_encode = msgspec.msgpack.Encoder().encode
_decode_scope = msgspec.msgpack.Decoder(_SavedScope).decode
_decode_window = msgspec.msgpack.Decoder(_SavedWindow).decode


class _Window:
    """One live window of a scope: which entries are its own, and the sums they add up to."""

    __slots__ = (
        "cost_us_by_user",
        "credit_us_by_node",
        "dirty",
        "had_usage",
        "identities",
        "last_rates",
        "node_index",
        "rates",
        "rates_used",
        "refused_revision",
        "saved",
        "start_ms",
        "usage_events",
        "user_index",
    )

    def __init__(self, start_ms: int, card: RateCard) -> None:
        self.start_ms = start_ms
        self.identities: list[bytes] = []
        self.user_index: dict[str, int] = {}
        self.node_index: dict[str, int] = {}
        self.cost_us_by_user: dict[str, int] = {}
        self.credit_us_by_node: dict[str, int] = {}
        self.usage_events = 0
        # A cell whose last usage was taken back must go on being posted, as zeros.
        self.had_usage = False
        self.dirty = False
        self.refused_revision = 0
        self.saved: bytes | None = None
        # Nearly every window lies within one version of the rates: then no event needs to look it up.
        first = card.version_at(start_ms)
        self.rates: RateVersion | None = first if first is card.version_at(start_ms + WINDOW_MS - 1) else None
        self.last_rates: RateVersion | None = None
        self.rates_used: set[RateVersion] = set()

    def count(
        self, card: RateCard, time_ms: int, asr: int, nmt: int, tts: int, gpu: int, user: str, node: str
    ) -> None:
        """Add one utterance's cost and credit to the sums."""
        rates = self.rates or card.version_at(time_ms)
        if rates is not self.last_rates:
            if rates is None:
                raise ValueError(f"usage at {time_ms} ms has no rate; it should have been refused")
            self.rates_used.add(rates)
            self.last_rates = rates
        assert rates is not None
        costs, credits = self.cost_us_by_user, self.credit_us_by_node
        costs[user] = costs.get(user, 0) + stages_cost_us(asr, nmt, tts, rates)
        credits[node] = credits.get(node, 0) + gpu_credit_us(gpu, rates)
        self.usage_events += 1
        self.had_usage = True

    def count_again(self, card: RateCard, entries: dict[bytes, bytes]) -> None:
        """Add the sums up from the entries: after a restart, or when an entry was taken back."""
        self.cost_us_by_user, self.credit_us_by_node, self.usage_events = {}, {}, 0
        self.rates_used, self.last_rates = set(), None
        users, nodes = list(self.user_index), list(self.node_index)
        for identity in self.identities:
            entry = entries[identity]
            if len(entry) == _USAGE.size:
                _, _, time_ms, asr, nmt, tts, gpu, user, node = _USAGE.unpack(entry)
                self.count(card, time_ms, asr, nmt, tts, gpu, users[user], nodes[node])

    def lifecycle(self, entries: dict[bytes, bytes]) -> Iterator[tuple[LifecycleKind, str | None, int]]:
        """(kind, user id, time) of every lifecycle event of the window."""
        users = list(self.user_index)
        for identity in self.identities:
            entry = entries[identity]
            if len(entry) == _LIFECYCLE.size:
                _, _, time_ms, kind, user = _LIFECYCLE.unpack(entry)
                yield LifecycleKind(kind), users[user - 1] if user else None, time_ms

    def save(self, entries: dict[bytes, bytes]) -> bytes:
        if self.saved is None:
            usage: list[bytes] = []
            lifecycle: list[bytes] = []
            for identity in self.identities:
                entry = entries[identity]
                (usage if len(entry) == _USAGE.size else lifecycle).append(identity + entry)
            window = _SavedWindow(
                self.start_ms,
                list(self.user_index),
                list(self.node_index),
                b"".join(usage),
                b"".join(lifecycle),
                self.had_usage,
            )
            self.saved = _encode(window)
        return self.saved

    @classmethod
    def load(cls, saved: bytes, card: RateCard, entries: dict[bytes, bytes]) -> _Window:
        """The window, with its entries put into `entries`."""
        parts = _decode_window(saved)
        window = cls(parts.start_ms, card)
        window.user_index = {user: index for index, user in enumerate(parts.users)}
        window.node_index = {node: index for index, node in enumerate(parts.nodes)}
        for packed, entry_bytes in ((parts.usage, _USAGE.size), (parts.lifecycle, _LIFECYCLE.size)):
            step = _IDENTITY_BYTES + entry_bytes
            for at in range(0, len(packed), step):
                identity = packed[at : at + _IDENTITY_BYTES]
                window.identities.append(identity)
                entries[identity] = packed[at + _IDENTITY_BYTES : at + step]
        window.count_again(card, entries)
        window.had_usage = parts.had_usage
        window.dirty = window.had_usage
        window.saved = saved
        return window


class LiveScope:
    """One scope's live state. Not thread-safe; does no I/O; every time comes in as an argument (ms)."""

    def __init__(
        self,
        scope: str,
        card: RateCard,
        frozen_before_ms: int = 0,
        presence_max_ms: int = PRESENCE_MAX_MS,
        revision_base: int = 0,
    ) -> None:
        self.scope = scope
        self._revision_base = revision_base
        self.frozen_before_ms = frozen_before_ms
        self.displaced = 0
        self._card = card
        self._room = is_room(scope)
        self._positions: dict[int, int] = {}
        self._windows: dict[int, _Window] = {}
        self._entries: dict[bytes, bytes] = {}
        self._presence = Presence(presence_max_ms, frozen_before_ms)
        self._first_event_ms: int | None = None
        self._last_event_ms = 0
        self._end_ms: int | None = None
        self._open = False
        self._fresh: list[int] = []

    # What comes in ------------------------------------------------------------------------------------

    def apply(self, located: Located) -> Outcome:
        """Take one event into account and say what became of it."""
        event, message = located.event, located.message
        if message.offset >= self._positions.get(message.partition, 0):
            self._positions[message.partition] = message.offset + 1
        start_ms = window_start_ms(event.time_ms)
        if start_ms < self.frozen_before_ms:
            return self._apply_late(event)
        identity = identity_digest(event.source, event.id)
        body = body_digest(event)
        known = self._entries.get(identity)
        if known is not None:
            return self._repeat(known, identity, body, located)
        self._put(start_ms, identity, body, position(message.partition, message.offset), event)
        if type(event) is Usage:
            self._fresh.append(message.appended_at_ms)
        return Outcome.APPLIED

    def _put(self, start_ms: int, identity: bytes, body: bytes, packed_position: int, event: Event) -> None:
        window = self._windows.get(start_ms)
        if window is None:
            window = self._windows[start_ms] = _Window(start_ms, self._card)
        window.saved = None
        window.identities.append(identity)
        users = window.user_index
        time_ms = event.time_ms
        if type(event) is Usage:
            nodes = window.node_index
            user_id, node_id = event.user_id, event.node_id
            asr, nmt, tts = event.asr_time_ms, event.nmt_time_ms, event.tts_time_ms
            gpu = event.gpu_active_time_ms
            self._entries[identity] = _USAGE.pack(
                body,
                packed_position,
                time_ms,
                asr,
                nmt,
                tts,
                gpu,
                users.setdefault(user_id, len(users)),
                nodes.setdefault(node_id, len(nodes)),
            )
            window.count(self._card, time_ms, asr, nmt, tts, gpu, user_id, node_id)
            window.dirty = True
        else:
            assert isinstance(event, Lifecycle)
            user = 0 if event.user_id is None else users.setdefault(event.user_id, len(users)) + 1
            self._entries[identity] = _LIFECYCLE.pack(body, packed_position, time_ms, event.kind, user)
            self._note_membership(event)
            if self._is_end(event.kind):
                self._end_ms = time_ms if self._end_ms is None else max(self._end_ms, time_ms)
        self._note_time(time_ms)

    def _note_time(self, time_ms: int) -> None:
        self._open = True
        if self._first_event_ms is None:
            self._first_event_ms = self._last_event_ms = time_ms
        elif time_ms > self._last_event_ms:
            self._last_event_ms = time_ms
        elif time_ms < self._first_event_ms:
            self._first_event_ms = time_ms

    def _is_end(self, kind: LifecycleKind) -> bool:
        return kind is (LifecycleKind.CLOSED if self._room else LifecycleKind.SESSION_ENDED)

    def _note_membership(self, event: Lifecycle) -> None:
        if event.kind > LifecycleKind.CLOSED:
            return
        self._presence.add(event.kind, event.user_id, event.time_ms)
        for window in self._windows.values():
            # A window that ended before the event has the members it had.
            if window.had_usage and window.start_ms + WINDOW_MS > event.time_ms:
                window.dirty = True

    def _apply_late(self, event: Event) -> Outcome:
        if isinstance(event, Lifecycle):
            self._note_membership(event)
            if self._is_end(event.kind):
                self._end_ms = event.time_ms if self._end_ms is None else max(self._end_ms, event.time_ms)
        if self._first_event_ms is not None:
            # Of a scope that is remembered this is news; a forgotten one has ended, and its record knows more.
            self._note_time(event.time_ms)
        return Outcome.LATE

    def _repeat(self, known: bytes, identity: bytes, body: bytes, located: Located) -> Outcome:
        event, message = located.event, located.message
        packed_position = position(message.partition, message.offset)
        known_position, known_time_ms = _POSITION_AND_TIME.unpack_from(known, _BODY_BYTES)
        window = self._windows[window_start_ms(known_time_ms)]
        if known[:_BODY_BYTES] == body:
            if packed_position < known_position:
                # The smaller position is what a later conflict is judged by.
                moved = bytearray(known)
                _POSITION_AND_TIME.pack_into(moved, _BODY_BYTES, packed_position, known_time_ms)
                self._entries[identity] = bytes(moved)
                window.saved = None
            return Outcome.DUPLICATE
        if packed_position >= known_position:
            return Outcome.CONFLICT
        self._take_back(window, identity)
        self._put(window_start_ms(event.time_ms), identity, body, packed_position, event)
        self.displaced = known_position
        return Outcome.DISPLACED

    def _take_back(self, window: _Window, identity: bytes) -> None:
        taken = self._entries.pop(identity)
        window.identities.remove(identity)
        window.saved = None
        if len(taken) == _USAGE.size:
            window.count_again(self._card, self._entries)
            window.dirty = True
            return
        membership = self._live_lifecycle()
        self._presence.replace(membership)
        self._end_ms = max((time_ms for kind, _, time_ms in membership if self._is_end(kind)), default=None)
        for live in self._windows.values():
            live.dirty = live.dirty or live.had_usage

    def _live_lifecycle(self) -> list[tuple[LifecycleKind, str | None, int]]:
        return [event for window in self._windows.values() for event in window.lifecycle(self._entries)]

    def raise_fence(self, frozen_before_ms: int) -> None:
        """Forget the windows before the fence; it only grows."""
        if frozen_before_ms <= self.frozen_before_ms:
            return
        self.frozen_before_ms = frozen_before_ms
        for start_ms in [start_ms for start_ms in self._windows if start_ms < frozen_before_ms]:
            self._forget(start_ms)
        self._presence.raise_fence(frozen_before_ms)

    def _forget(self, start_ms: int) -> None:
        for identity in self._windows.pop(start_ms).identities:
            del self._entries[identity]

    def answer(self, window_start: int, revision: int, answer: Answer) -> None:
        """What the keeper of the balances said to the posting of this window at this revision."""
        window = self._windows.get(window_start)
        if window is None or answer is Answer.POSTED:
            return
        if answer is Answer.FROZEN:
            self._forget(window_start)
            return
        window.dirty = True
        window.refused_revision = max(window.refused_revision, revision)

    # What goes out ------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Grows with every event of the scope, along the log."""
        return self._revision_base + sum(self._positions.values())

    def emission_due(self) -> bool:
        """Whether there is anything to post that was not refused at this very revision."""
        revision = self.revision
        return self._has_ended() or any(
            window.dirty and window.refused_revision < revision for window in self._windows.values()
        )

    def _has_ended(self) -> bool:
        return self._open and self._end_ms is not None and self._end_ms >= self._last_event_ms

    @property
    def open(self) -> bool:
        """Whether events came since the last ending was emitted."""
        return self._open

    def emit(self, *, silent: bool = False) -> Emission | None:
        """Everything dirty, and the ending if there is one; `silent` says that the idle timeout is over."""
        revision = self.revision
        cells = []
        for window in self._windows.values():
            if window.dirty and window.refused_revision < revision:
                cells.append(self._posting(window, revision))
                window.dirty = False
        ending = self._ending(revision, silent)
        if not cells and ending is None:
            return None
        fresh, self._fresh = self._fresh, []
        return Emission(self.scope, cells, ending, fresh)

    def _posting(self, window: _Window, revision: int) -> CellPosting:
        start_ms = window.start_ms
        if window.usage_events:
            members: frozenset[str] = frozenset()
            if self._room:
                members = self._presence.members(start_ms, start_ms + WINDOW_MS)
            amounts = cell_vector(
                self.scope, start_ms, window.cost_us_by_user, window.credit_us_by_node, members
            )
            del amounts[REVENUE]
        else:
            amounts = {}
        rate_version = ",".join(sorted(rates.name for rates in window.rates_used))
        return CellPosting(cell_id(self.scope, start_ms), start_ms, revision, amounts, rate_version)

    def _ending(self, revision: int, silent: bool) -> Ending | None:
        ended = self._has_ended()
        if self._first_event_ms is None or (not ended and not (silent and self._open)):
            return None
        self._open = False
        reason = SettlementReason.ENDED if ended else SettlementReason.TIMEOUT
        return Ending(reason, self._first_event_ms, self._last_event_ms, revision)

    # What is kept -------------------------------------------------------------------------------------

    @property
    def forgettable(self) -> bool:
        """Whether dropping this state would change no later vector."""
        return not self._open and not self._windows and self._presence.empty

    def snapshot(self) -> bytes:
        """The whole state; windows that did not change since the last snapshot are only copied."""
        joins, ends, closed = self._presence.folded()
        windows = [window.save(self._entries) for window in self._windows.values()]
        return _encode(
            _SavedScope(
                self.scope,
                self._positions,
                self.frozen_before_ms,
                windows,
                joins,
                ends,
                closed,
                self._first_event_ms,
                self._last_event_ms,
                self._end_ms,
                self._open,
            )
        )

    @classmethod
    def restore(
        cls,
        saved: bytes,
        card: RateCard,
        presence_max_ms: int = PRESENCE_MAX_MS,
        revision_base: int = 0,
    ) -> LiveScope:
        """The state that `snapshot` gave, with every live cell dirty. The base is of the log, not of the state:
        a flow that goes on with another log starts without a state."""
        parts = _decode_scope(saved)
        live = cls(parts.scope, card, parts.frozen_before_ms, presence_max_ms, revision_base)
        live._positions = parts.positions
        for packed in parts.windows:
            window = _Window.load(packed, card, live._entries)
            live._windows[window.start_ms] = window
        live._presence.restore_folded(parts.joins_below, parts.ends_below, parts.closed_below)
        live._presence.replace(live._live_lifecycle())
        live._first_event_ms, live._last_event_ms = parts.first_event_ms, parts.last_event_ms
        live._end_ms, live._open = parts.end_ms, parts.open
        return live
