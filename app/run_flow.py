"""Runs one flow in the place of this process: `python -m app.run_flow settlement`.

What a container starts. The command line is that of `metering up`; the flow's recovery store, if it has one,
lies in `METERING_STATE_DIR/recovery/<flow>` and is made when missing, all of it or nothing.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from app.adopt_log import recovery_store
from app.errors import CommandError
from app.supervisor import default_flows, make_recovery_store
from schemas.settings import Settings, SettingsError, load_settings


def flow_command(name: str, settings: Settings) -> list[str]:
    """The command that runs the flow, its recovery store made if need be. Raises CommandError."""
    flows = {flow.name: flow for flow in default_flows(settings)}
    if name not in flows:
        raise CommandError(f"there is no flow {name!r}: choose {', '.join(flows)}", exit_code=2)
    command = list(flows[name].argv)
    if flows[name].needs_recovery:
        store = recovery_store(settings, name)
        try:
            make_recovery_store(store)
        except OSError as problem:
            raise CommandError(f"METERING_STATE_DIR={settings.state_dir}: {problem.strerror}") from None
        command += ["-r", str(store)]
    return command


def main(arguments: list[str]) -> NoReturn:
    """Become the flow that the one argument names; whatever prevents it is one line and an exit code."""
    try:
        if len(arguments) != 1:
            raise CommandError("which flow? python -m app.run_flow NAME", exit_code=2)
        command = flow_command(arguments[0], load_settings())
    except (CommandError, SettingsError) as problem:
        sys.stderr.write(f"metering: {problem}\n")
        raise SystemExit(getattr(problem, "exit_code", 2)) from None
    # The flow takes over this process, so that signals and the exit code are its own.
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
