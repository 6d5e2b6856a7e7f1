"""The code that a simulation runs. A planted bug is a `Parts` with one of them replaced."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from flows.ledger import JournalSink
from flows.settlement import SettleScope
from flows.usage_store import StoreSink
from metering.live import LiveScope
from metering.resettle import Resettled, Step, resettle
from sinks.balances_memory import MemoryBalances
from sinks.memory import MemoryArchive


@dataclass(frozen=True)
class Parts:
    """Classes and functions of the project, by the role that they have in the simulation."""

    live_scope: type[LiveScope] = LiveScope
    settle_scope: type[SettleScope] = SettleScope
    book: type[MemoryBalances] = MemoryBalances
    journal_sink: type[JournalSink] = JournalSink
    store_sink: type[StoreSink] = StoreSink
    archive: type[MemoryArchive] = MemoryArchive
    resettle: Callable[..., Generator[Step, None, Resettled]] = resettle
    commit_before_post: bool = False
    """Whether an epoch's snapshots are committed before its postings are made: Bytewax does it after."""
    commands_reread: int = 5
    """From how many commits before the last one the topic of commands is read again; its source goes back by a
    minute."""
    ledger_notes_what_it_finds: bool = False
    """Whether the ledger, at its start, tells Redis that the last entry that it has any row of is stored."""
    ledger_looks_ahead: bool = True
    """Whether the ledger, before it stores anything again, looks at the last entry that it has stored."""
    ledger_batch: int = 100
    """How many entries the ledger stores at once, at most."""
