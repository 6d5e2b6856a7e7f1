"""How far `metering emit` is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class EmitProgress:
    """Follows deliveries by the bytes of the file, as a context manager; a pipe has no known end."""

    def __init__(self, file: BinaryIO) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.fields[events]:,} events"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("emit", total=_size(file), events=0)
        self._events = 0

    def __enter__(self) -> EmitProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def delivered(self, message_bytes: int) -> None:
        """One more message of so many bytes has been acknowledged."""
        self._events += 1
        self._progress.update(self._task, advance=message_bytes, events=self._events)


def _size(file: BinaryIO) -> int | None:
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
