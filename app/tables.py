"""How balances, statements and bills look on a screen. Amounts come in us and are shown as minutes."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from app.views import Balance, Share, StatementLine
from metering.money import minutes
from schemas.rfc3339 import format_rfc3339_ms


def minutes_text(amount_us: int, sign: bool = False) -> str:
    """Balance minutes with four decimals, rounded for the eye only (1 us is 0.000 000 017 minutes)."""
    return f"{minutes(amount_us):{'+' if sign else ''},.4f}"


def balance_table(balances: Iterable[Balance]) -> Table:
    """One row per account."""
    table = Table("account", title="Live balances (Redis)", title_justify="left")
    for heading in ("minutes", "us", "held", "floor", "lines"):
        table.add_column(heading, justify="right")
    for entry in balances:
        table.add_row(
            entry.account,
            minutes_text(entry.balance_us),
            f"{entry.balance_us:,}",
            minutes_text(entry.held_us),
            minutes_text(entry.floor_us),
            f"{entry.seq:,}",
        )
    return table


def statement_table(lines: list[StatementLine]) -> Table:
    """One row per ledger line."""
    table = Table(title=f"Statement of {lines[0].account} (ClickHouse, minutes)", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("posted (UTC)")
    table.add_column("reason")
    for heading in ("before", "change", "after"):
        table.add_column(heading, justify="right")
    table.add_column("for", overflow="fold")
    for line in lines:
        table.add_row(
            str(line.seq),
            format_rfc3339_ms(line.posted_at_ms)[:-5].replace("T", " "),
            line.reason,
            minutes_text(line.balance_before_us),
            minutes_text(line.change_us, sign=True),
            minutes_text(line.balance_after_us),
            _cause(line),
        )
    return table


def _cause(line: StatementLine) -> str:
    if not line.cell_id:
        return f"request {line.request_id}" + (f" ({line.note})" if line.note else "")
    scope, _, window_start_ms = line.cell_id.rpartition("@")
    return f"{scope} {format_rfc3339_ms(int(window_start_ms))[11:16]}"


def bill_table(shares: list[Share]) -> Table:
    """One row per payer, and the total."""
    scope, total_us = shares[0].scope, shares[0].total_us
    state = "settled" if shares[0].settled else "still open"
    table = Table(title=f"Bill of {scope}, {state} (ClickHouse)", title_justify="left", show_footer=True)
    table.add_column("payer", "total")
    table.add_column("windows", justify="right")
    table.add_column("share, minutes", minutes_text(total_us), justify="right")
    table.add_column("share, us", f"{total_us:,}", justify="right")
    for share in shares:
        table.add_row(
            f"user/{share.user_id}",
            str(share.windows),
            minutes_text(share.share_us),
            f"{share.share_us:,}",
        )
    return table
