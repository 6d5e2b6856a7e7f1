"""`metering up` with stand-ins for the flows and the preparations, as a program.

Each preparation adds its name to `DIR/hooks.log`, and with it which readers were running at that time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from app.errors import CommandError
from app.supervisor import Flow, Hooks, run_up
from schemas.settings import Settings
from tests.support.processes import children

READER = "stand_in_flow reader"


def main() -> int:
    """Run until SIGTERM, like the real command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--broker", default="tansu")
    parser.add_argument("--behaviour", default="patient", help="of the flow `other`")
    parser.add_argument("--slow-topics", action="store_true", help="create_topics takes a minute")
    arguments = parser.parse_args()
    directory: Path = arguments.directory

    def hook(name: str, lasts_s: float = 0.0) -> Callable[[Settings], None]:
        def run(_settings: Settings) -> None:
            readers = sum(READER in command for command in children(os.getpid()).values())
            with (directory / "hooks.log").open("a") as log:
                log.write(f"{name} with {readers} readers\n")
            time.sleep(lasts_s)

        return run

    flows = (
        flow("reader", "patient", reads_broker=True),
        flow("other", arguments.behaviour, reads_broker=False),
    )
    topics = hook("topics", lasts_s=60.0 if arguments.slow_topics else 0.0)
    hooks = Hooks(prepare_stores=hook("stores"), create_topics=topics, adopt_new_log=hook("adopt"))
    try:
        return run_up(directory, broker=arguments.broker, settings=Settings(), flows=flows, hooks=hooks)
    except CommandError as problem:
        print(f"metering: {problem}", file=sys.stderr)
        return problem.exit_code


def flow(name: str, behaviour: str, reads_broker: bool) -> Flow:
    """A stand-in that gives up on SIGTERM sooner than a real flow."""
    argv = (sys.executable, "-m", "tests.support.stand_in_flow", name, behaviour)
    return Flow(name, argv, reads_broker=reads_broker, stop_deadline_s=1.0)


if __name__ == "__main__":
    raise SystemExit(main())
