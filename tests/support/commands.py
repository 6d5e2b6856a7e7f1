"""The `metering` command line as a test runs it: another process, as for anybody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment with only these settings (`kafka="..."`), whatever the developer has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("METERING_")}
    return kept | {f"METERING_{name.upper()}": value for name, value in settings.items()}


def metering(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    timeout_s: float = 120.0,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; stdout and stderr are bytes."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        env=dict(clean_environment() if environment is None else environment),
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def one_line(output: bytes) -> str:
    """The only line of an output. Fails when it is not exactly one, as it is when there is a traceback."""
    lines = output.decode().splitlines()
    assert len(lines) == 1, output.decode()
    return lines[0]
