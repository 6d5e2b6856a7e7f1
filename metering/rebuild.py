"""Rebuild: makes an empty or older book what the ledger says, under a new epoch.

Laws:
- First nobody may write: the epoch is removed, and every script refuses. Last everybody may: the new epoch is
  announced. Whatever kills the rebuild in between leaves a book that refuses; running it again starts over, with
  the next epoch.
- The ledger is taken as it stands at one outbox entry. What older epochs wrote after that entry is void, however
  late it arrives in the ledger (a reader that was stopped in the middle of an insert): this is recorded in the
  archive before anything is read.
- Postings that were not in the ledger are not lost, since they are functions of what is kept elsewhere: cells
  of the usage store (every window that may have been posted is frozen, and the next resettle makes it whole),
  commands of their topic (all are read again; those that the ledger knows are answered with their first result).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from metering.cells import WINDOW_MS, window_start_ms
from metering.grants import Grant
from metering.ports import BalanceBook, Log
from schemas.commands import Command
from schemas.decode import FUTURE_TOLERANCE_MS
from schemas.records import RequestRecord


class AccountState(NamedTuple):
    """What the ledger knows about an account; `floor_us` is None where it is the default. Grants are those that
    did not expire; what went beyond them is not known, and counts from zero again."""

    account: str
    balance_us: int
    seq: int
    floor_us: int | None
    grants: tuple[Grant, ...] = ()


class LedgerArchive(Protocol):
    """The ledger and the usage store, as a rebuild reads them. Methods block and raise the store's errors."""

    def newest_epoch(self) -> int:
        """The highest epoch that anything was written in; 0 when nothing was."""

    def last_complete_entry(self) -> int:
        """The last outbox entry up to which the ledger has every entry whole; 0 when there is none."""

    def record_epoch(self, epoch: int, after_entry: int) -> None:
        """Void what older epochs wrote after this entry."""

    def accounts(self) -> Iterator[list[AccountState]]:
        """Every account, some at a time."""

    def requests(self) -> Iterator[list[RequestRecord]]:
        """Every money command that was carried out, some at a time."""

    def last_window_ms(self) -> int | None:
        """The start of the last window with stored usage or ledger lines."""

    def last_fence_ms(self) -> int:
        """The highest fence that anybody was ever told of; 0 when there was none."""

    def stored_offsets(self) -> Mapping[int, int]:
        """As in `metering.ports.Archive`."""


class EmptyBook(Protocol):
    """The book from below: written without its scripts, while they refuse to run."""

    def newest_epoch(self) -> int:
        """The highest epoch that it knows; 0 when it knows none."""

    def last_window_ms(self) -> int | None:
        """The start of the last window that it has a live cell of."""

    def remove_epoch(self) -> None:
        """From here on every script of every caller refuses."""

    def clear(self, epoch: int, entries: int) -> None:
        """Forget cells, requests, outbox, resettles and every balance; number entries from `entries` on; name the
        coming epoch, so that scripts run for whoever knows it."""

    def restore_accounts(self, accounts: Sequence[AccountState]) -> None:
        """Write balances, numbers of last lines, and floors. Holds stay."""

    def restore_requests(self, requests: Sequence[RequestRecord]) -> None:
        """Write first results of money commands."""

    def forget_accounts(self) -> int:
        """Remove what is left of accounts that were not restored since `clear`; how many these were."""

    def announce(self, epoch: int) -> None:
        """Make the coming epoch the epoch."""


class Step(StrEnum):
    """Where the procedure stands when it lets its driver go on."""

    EPOCH_REMOVED = "epoch removed"
    RECORDED = "epoch recorded"
    CLEARED = "cleared"
    WAITING = "waiting"
    """The usage store is behind the log: call again in a moment."""
    BALANCES_WRITTEN = "balances written"
    COMMANDS_READ = "commands read"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did."""

    epoch: int
    after_entry: int
    accounts: int
    forgotten: int
    """Accounts that Redis had and the ledger knows nothing of."""
    requests: int
    commands: int
    frozen_before_ms: int


def rebuild(
    empty: EmptyBook,
    archive: LedgerArchive,
    log: Log,
    open_book: Callable[[int, int], BalanceBook],
    commands: Callable[[], Iterable[Command]],
    *,
    remembered_epoch: int,
    now_ms: Callable[[], int],
    tired_of_waiting: Callable[[], bool],
) -> Generator[Step, None, Rebuilt]:
    """Rebuild the book. `open_book(epoch, seen entry)` opens it with scripts; `commands` reads the topic from its
    head to its end. When `tired_of_waiting` for the usage store, everything is frozen that may have arrived."""
    epoch = max(empty.newest_epoch(), archive.newest_epoch(), remembered_epoch) + 1
    last_live_window_ms = empty.last_window_ms()
    empty.remove_epoch()
    yield Step.EPOCH_REMOVED
    after_entry = archive.last_complete_entry()
    archive.record_epoch(epoch, after_entry)
    yield Step.RECORDED
    empty.clear(epoch, after_entry)
    yield Step.CLEARED
    ends = log.ends()
    tired = False
    while any(archive.stored_offsets().get(partition, 0) < end for partition, end in ends.items()):
        tired = tired_of_waiting()
        if tired:
            break
        yield Step.WAITING
    windows = [last_live_window_ms, archive.last_window_ms()]
    if tired:
        # What the usage store lacks was appended before now, so its event times end at most the tolerance later.
        windows.append(window_start_ms(now_ms() + FUTURE_TOLERANCE_MS))
    accounts = requests = read = 0
    for restored in archive.accounts():
        empty.restore_accounts(restored)
        accounts += len(restored)
    for carried_out in archive.requests():
        empty.restore_requests(carried_out)
        requests += len(carried_out)
    forgotten = empty.forget_accounts()
    yield Step.BALANCES_WRITTEN
    book = open_book(epoch, after_entry)
    # The flows remember the fence that they knew: it must not fall.
    fences = [archive.last_fence_ms(), *(window + WINDOW_MS for window in windows if window is not None)]
    frozen_before_ms = book.raise_fence(max(fences))
    for command in commands():
        book.apply_command(command)
        read += 1
    yield Step.COMMANDS_READ
    empty.announce(epoch)
    return Rebuilt(epoch, after_entry, accounts, forgotten, requests, read, frozen_before_ms)
