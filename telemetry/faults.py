"""Named points between two effects, at which a test may have a process kill itself. Off by default.

`METERING_FAULT=<point>` kills the process with SIGKILL when it first gets there, `<point>:<n>` the n-th time.
With `METERING_FAULT_ONCE=<file>` it does so only while that file does not exist, and makes it first: so a
process that is started again with the same environment gets past the point.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

AFTER_REDIS_SCRIPT = "after_redis_script"
"""settlement: postings are in Redis, the snapshot is not taken."""
AFTER_CLICKHOUSE_INSERT = "after_clickhouse_insert"
"""ledger: rows are in ClickHouse, the outbox is not trimmed and its position not noted."""
AFTER_USAGE_INSERT = "after_usage_insert"
"""usage_store: rows are in ClickHouse, neither their position nor a snapshot is."""
AFTER_ALERTS_SENT = "after_alerts_sent"
"""alerts: alerts are in Kafka, how far they are is not noted."""
WRITE_OFF_PLANNED = "write_off_planned"
"""write_off: the plan of a period is written down, nothing is sent."""
WRITE_OFF_SENT = "write_off_sent"
"""write_off: the transfers are in the log, none is closed."""
WRITE_OFF_CLOSED_ONE = "write_off_closed_one"
"""write_off: one transfer is closed and in the audit log, others are not."""
DURING_MIGRATION = "during_migration"
"""migrate: a migration's effect is there, its record is not."""
RESETTLE_TOKEN_TAKEN = "resettle_token_taken"
"""resettle: the token is taken and nothing read."""
RESETTLE_READ = "resettle_read"
"""resettle: corrections are computed and not posted."""
RESETTLE_POSTED = "resettle_posted"
"""resettle: some corrections are posted, others are not, and the run is not recorded as complete."""
REBUILD_EPOCH_REMOVED = "rebuild_epoch_removed"
"""rebuild-balances: every script refuses, nothing is restored yet."""
REBUILD_BALANCES_WRITTEN = "rebuild_balances_written"
"""rebuild-balances: balances are restored, commands are not read again."""
REBUILD_COMMANDS_READ = "rebuild_commands_read"
"""rebuild-balances: all is restored, the new epoch is not announced."""
ACCOUNTS_REQUEST_NOTED = "accounts_request_noted"
"""accounts: a money request and its audit entry are written, its command is not sent."""
ACCOUNTS_COMMAND_SENT = "accounts_command_sent"
"""accounts: the command is in Kafka, the caller has no answer."""

POINTS = (
    AFTER_REDIS_SCRIPT,
    AFTER_CLICKHOUSE_INSERT,
    AFTER_USAGE_INSERT,
    WRITE_OFF_PLANNED,
    WRITE_OFF_SENT,
    WRITE_OFF_CLOSED_ONE,
    DURING_MIGRATION,
    RESETTLE_TOKEN_TAKEN,
    RESETTLE_READ,
    RESETTLE_POSTED,
    REBUILD_EPOCH_REMOVED,
    REBUILD_BALANCES_WRITTEN,
    REBUILD_COMMANDS_READ,
)

ALERTS_POINTS = (AFTER_ALERTS_SENT,)

ACCOUNTS_POINTS = (ACCOUNTS_REQUEST_NOTED, ACCOUNTS_COMMAND_SENT)
"""Of the accounts API, which the chaos harness does not run: tests/accounts/pipeline/test_kill.py kills it
there.
"""

_point, _, _nth = os.environ.get("METERING_FAULT", "").partition(":")
_once = os.environ.get("METERING_FAULT_ONCE", "")
_reached: Counter[str] = Counter()


def reach(point: str) -> None:
    """Say that the process is at `point`; returns, unless a fault was asked for here."""
    if point != _point:
        return
    _reached[point] += 1
    if _reached[point] != int(_nth or 1):
        return
    if _once:
        try:
            Path(_once).touch(exist_ok=False)
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
