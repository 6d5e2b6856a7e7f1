"""A process in a flow's place: `python -m tests.support.stand_in_flow NAME BEHAVIOUR`.

It writes METERING_READY_FILE, and waits. With `stubborn` it ignores SIGTERM; with `broken` it says why it
cannot work and ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(name: str, behaviour: str) -> None:
    """Behave as told until a signal ends it."""
    print(f"{name} starts with {os.environ['METERING_KAFKA']}", flush=True)
    if behaviour == "broken":
        raise SystemExit(f"{name}: the rate card is upside down")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(os.environ["METERING_READY_FILE"]).touch()
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
