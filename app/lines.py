"""Files of messages, one per line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from app.errors import CommandError

_BATCH = 2_000


@contextmanager
def open_lines(path: str) -> Iterator[BinaryIO]:
    """The file, or standard input for `-`. Raises CommandError, exit code 2, if it cannot be opened."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with _open(path, "rb") as file:
        yield file


@contextmanager
def create_lines(path: str) -> Iterator[BinaryIO]:
    """The file to write, or standard output for `-`. CommandError, exit code 2, if it cannot be made."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with _open(path, "wb") as file:
        yield file


def _open(path: str, mode: Literal["rb", "wb"]) -> BinaryIO:
    # Apart from its use, whose own OSErrors (a closed pipe, a full disk) are no trouble with opening it.
    try:
        return Path(path).open(mode)
    except OSError as problem:
        raise CommandError(f"{path}: {problem.strerror or problem}", exit_code=2) from None


def messages(file: BinaryIO) -> Iterator[bytes]:
    """The messages of a file, without line ends; blank lines are passed over."""
    for line in file:
        message = line.rstrip(b"\r\n")
        if message.strip():
            yield message


def write_messages(file: BinaryIO, lines: Iterable[bytes]) -> int:
    """Write one message per line; gives their number."""
    written = 0
    batch: list[bytes] = []
    for line in lines:
        batch += (line, b"\n")
        if len(batch) >= _BATCH:
            file.write(b"".join(batch))
            written += len(batch) // 2
            batch.clear()
    file.write(b"".join(batch))
    return written + len(batch) // 2
