"""What came out, for people (a table) and for programs (a JSON line per round, written when the round is over)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from chaos.rounds import Played


def as_record(played: Played) -> dict[str, Any]:
    """A round as JSON."""
    return {
        "seed": played.seed,
        "round": played.round.number,
        "world": played.world,
        "world_kind": played.world_kind,
        "scene": played.round.scene,
        "settings": dict(played.round.settings),
        "passed": played.passed,
        "stuck": played.stuck,
        "differences": {name: len(found) for name, found in played.verdict.sorts()},
        "first_differences": list(played.verdict.lines()),
        "messages": played.messages,
        "accounts": played.accounts,
        "cell_lines": played.cell_lines,
        "seconds": round(played.seconds, 1),
        "ended_by_themselves": {f"{name}: {how}": count for (name, how), count in played.ended.items()},
        "faults": [
            {
                "kind": struck.kind,
                "kills": dict(struck.kills),
                "points": dict(struck.points),
                "disturbances": dict(struck.disturbances),
                "balances_s": _rounded(struck.balances_s),
                "archive_s": _rounded(struck.archive_s),
                "repair_s": _rounded(struck.repair_s),
            }
            for struck in played.struck
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line, so that a run that is killed keeps what it had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All rounds in a file, of however many runs."""
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def kills_table(records: Iterable[dict[str, Any]]) -> Table:
    """Kills per process and per point, and what else went wrong, with the times to recover."""
    rounds = list(records)
    faults = [fault for each in rounds for fault in each["faults"]]
    kills, points, disturbances = Counter[str](), Counter[str](), Counter[str]()
    for fault in faults:
        kills.update(fault["kills"])
        points.update(fault["points"])
        disturbances.update(fault["disturbances"])
    seeds = ", ".join(str(seed) for seed in sorted({each["seed"] for each in rounds}))
    failed = sum(not each["passed"] for each in rounds)
    table = Table(
        title=f"{sum(kills.values())} kills in {len(rounds)} rounds, {failed} of them failed; seed {seeds}",
        caption="seconds: min / median / max. balances: from the kill, or the end of a disturbance, until all that "
        "was sent before was on the balances; archive: in ledger and usage store too",
    )
    for column in ("what", "times", "balances", "archive", "command again"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for title, counts in (
        ("killed with SIGKILL", kills),
        ("of these at a named point", points),
        ("disturbed", disturbances),
    ):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", str(sum(counts.values())))
        for name, count in sorted(counts.items()):
            of_kind = [fault for fault in faults if fault["kind"] == name]
            table.add_row(
                f"  {name}",
                str(count),
                *(_times(of_kind, what) for what in ("balances_s", "archive_s", "repair_s")),
            )
    return table


def _times(faults: list[dict[str, Any]], what: str) -> str:
    seconds = [fault[what] for fault in faults if fault[what] is not None]
    return f"{min(seconds):.1f} / {median(seconds):.1f} / {max(seconds):.1f}" if seconds else ""


def differences_table(records: Iterable[dict[str, Any]]) -> Table:
    """What was compared, and what was wrong: all of it must be 0."""
    rounds = list(records)
    table = Table(title="compared with the pure function")
    table.add_column("what")
    table.add_column("count", justify="right")
    # A world is compared as a whole after each round: its last round has seen everything.
    last = {(each["seed"], each["world"]): each for each in rounds}
    for name in ("messages", "accounts", "cell_lines"):
        table.add_row(
            f"{name.replace('_', ' ')}, all worlds", f"{sum(each[name] for each in last.values()):,}"
        )
    table.add_section()
    sums: Counter[str] = Counter()
    for each in rounds:
        for name, count in each["differences"].items():
            sums[name] += count
    for name, count in sums.items():
        table.add_row(name, str(count))
    table.add_row("did not come to rest", str(sum(bool(each["stuck"]) for each in rounds)))
    return table
