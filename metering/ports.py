"""The ports through which settlement moves money, so that a flow runs alike on Redis and on its twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from metering.commands import CommandResult
from metering.facts import Correction, ScopeFacts
from metering.live import Answer, Emission
from schemas.commands import Command
from schemas.messages import OutboxMessage


class WrongRedis(Exception):
    """The book is not the one that the caller means: its epoch is missing or another, or it has lost what the
    caller saw in it before. One clear line."""


class SeenEntry(NamedTuple):
    """An outbox entry that somebody has seen: a book that has fewer, or another one in its place, lost its end."""

    number: int = 0
    name: str = ""
    """What tells it from another entry of the same number; empty when that is not known."""


NOTHING_SEEN = SeenEntry()


class ResettleTicket(NamedTuple):
    """What a resettle begins with. Everything was read in one step, after all older tokens became void."""

    token: int
    frozen_before_ms: int
    """The fence: no live posting for a window before it can come after this."""
    entries: int
    """The number of the last outbox entry: what older resettles and live postings said is at or before it."""
    at_ms: int
    """The clock of the book."""
    done_frozen_before_ms: int
    """The fence of the last complete resettle; 0 when there was none."""
    done_appended_before_ms: int
    """Usage appended before this was considered by it; 0 when there was none."""


class CorrectionAnswer(IntEnum):
    """What became of a call with corrections."""

    POSTED = 1
    REPEATED = 2
    """This very call was carried out before: its answer was lost."""
    STALE = 3
    """A newer resettle has taken over; nothing was done."""


class BalanceBook(Protocol):
    """Keeps balances, cells' last vectors, requests and the fence; appends ledger lines to the outbox.

    All methods are idempotent (a repeated `begin_resettle` only takes another token) and block until they are
    done: they wait while the server is away or the outbox is full. They raise WrongRedis when the book is not
    the expected one, and then nothing was done.
    """

    def post(self, emissions: Sequence[Emission]) -> list[list[Answer]]:
        """Post cells and endings; the answers stand in the order of each emission's cells."""

    def apply_command(self, command: Command) -> CommandResult:
        """Carry out a money command once."""

    def expire_grants(self) -> int:
        """Take back what is left of grants whose end the fence has passed; how many expired."""

    def compact_requests(self, retention_ms: int) -> int:
        """Replace results of commands that the ledger has, and that are older than this, by marks that the request
        ids are spent; returns how many."""

    def set_floor(self, account: str, floor_us: int) -> None:
        """Give an account a floor of its own."""

    def raise_fence(self, frozen_before_ms: int) -> int:
        """Raise the fence, if that is higher, and forget frozen cells; returns where it stands (ms)."""

    @property
    def known_fence_ms(self) -> int:
        """Where the fence stood at the last answer; costs no round trip."""

    def begin_resettle(self) -> ResettleTicket:
        """Take the next token, which voids all older ones."""

    def post_corrections(self, token: int, step: int, corrections: Sequence[Correction]) -> CorrectionAnswer:
        """Post changes of frozen cells, all or none. `step` counts the calls of a token from 1."""

    def end_resettle(self, token: int, frozen_before_ms: int, appended_before_ms: int) -> None:
        """Remember up to where a resettle was complete; nothing when a newer one has taken over."""

    def stored_entry(self) -> int:
        """The number of the last outbox entry whose rows are in the ledger."""


class Archive(Protocol):
    """The usage store and the ledger, as a resettle reads them. Methods block and raise the store's errors."""

    def stored_offsets(self) -> Mapping[int, int]:
        """Partition -> everything before this offset is stored, for the log that is read now."""

    def facts_since(self, since_ms: int, frozen_before_ms: int) -> Iterator[list[ScopeFacts]]:
        """Every scope with usage or ledger lines in the windows [since, frozen before), some scopes at a time."""

    def facts_changed(
        self, appended_since_ms: int, frozen_from_ms: int, frozen_before_ms: int
    ) -> Iterator[list[ScopeFacts]]:
        """The scopes whose frozen cells may have changed: by events appended since, or because their windows
        were frozen only lately, [frozen from, frozen before)."""


class Log(Protocol):
    """The topic of events, as far as a resettle must know it."""

    def ends(self) -> Mapping[int, int]:
        """Partition -> offset of the next message to come, for partitions that have any message."""


class Outbox(Protocol):
    """The stream that scripts append to, from the side of its one reader. Methods block while it is away."""

    def note_stored(self, last: OutboxMessage, number: int) -> int:
        """Note that entries up to this one are stored, and forget those past the retention; returns how many
        entries are left. Raises WrongRedis when the outbox is not the one that the entries came from."""

    def set_aside(self, message: OutboxMessage, why: str) -> None:
        """Keep an entry that nobody can read where trimming does not reach it."""
