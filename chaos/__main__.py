"""`make chaos`: kills under load, and the comparison. Exit code 0 when every round agreed, 1 when one did not."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from app.errors import CommandError
from chaos import report
from chaos.keeper import Stuck
from chaos.plan import KINDS, SCENES, Wishes
from chaos.rounds import play
from schemas.settings import PREFIX

DEFAULT_MINUTES = 10.0


def main() -> int:
    """Play rounds as the options say."""
    options = _options()
    faulthandler.register(signal.SIGUSR1)
    # Whatever the developer has set is not for the worlds here.
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    # It logs what it raises too, and servers that are away are the point here.
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    wishes = Wishes(
        seed,
        broker_keeps_log=options.broker == "apache",
        only=tuple(options.only),
        scenes=tuple(options.scene),
        faults_per_round=options.faults,
        quick=options.quick,
    )
    say(f"seed {seed}: the same plan again with --seed {seed}")
    directory = options.dir or Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()
    minutes = options.minutes if options.minutes or options.rounds else DEFAULT_MINUTES

    def enough(rounds: int) -> bool:
        late = bool(minutes) and time.monotonic() - started > minutes * 60
        return late or (options.rounds is not None and rounds >= options.rounds)

    records = []
    failed = False
    try:
        for played in play(
            wishes, directory, broker=options.broker, rate_per_s=options.rate, until=enough, say=say
        ):
            record = report.as_record(played)
            records.append(record)
            if options.json is not None:
                report.append(options.json, record)
            kills = sum(sum(fault["kills"].values()) for fault in record["faults"])
            say(
                f"    {'agrees' if played.passed else 'DIFFERS'}: {kills} kills, {played.messages} messages, "
                f"{played.cell_lines} amounts of {played.accounts} accounts, {played.seconds:.0f} s"
            )
            if not played.passed:
                failed = True
                say(f"seed {seed}, round {played.round.number}: {played.stuck or 'the books differ'}")
                for line in played.verdict.lines():
                    say(line)
    except (CommandError, Stuck, ValueError) as problem:
        say(f"chaos: {problem}")
        failed = True
    except KeyboardInterrupt:
        say("chaos: interrupted")
        failed = True
    if records:
        console.print(report.kills_table(records))
        console.print(report.differences_table(records))
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the plan; by default a new one, which is printed")
    parser.add_argument("--rounds", type=int, help="stop after so many")
    parser.add_argument("--minutes", type=float, help="begin no round after so many")
    parser.add_argument(
        "--only", action="append", default=[], choices=KINDS, metavar="KIND", help="; ".join(KINDS)
    )
    parser.add_argument(
        "--scene", action="append", default=[], choices=tuple(SCENES), help="only such rounds"
    )
    parser.add_argument("--faults", type=int, help="at most so many a round")
    parser.add_argument(
        "--broker", choices=("apache", "tansu"), default="apache", help="tansu is never killed"
    )
    parser.add_argument("--rate", type=int, default=120, help="messages a second")
    parser.add_argument("--quick", action="store_true", help="short pauses and disturbances")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line per round")
    parser.add_argument("--dir", type=Path, help="where the worlds live; a failed one is kept there")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
