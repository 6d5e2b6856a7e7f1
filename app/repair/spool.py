"""Records sorted onto disk by range of scopes: what is stored in another order is compared range by range."""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from types import TracebackType

from sources.archive import ScopeRange

BUFFER_BYTES = 1 << 16
"""Of one range before it goes to disk; a few hundred ranges are a few tens of MB."""


class ScopeSpool:
    """One temporary file without a name, so that a killed process leaves nothing; a context manager. Each range of
    scopes has its pieces of the file, and every piece holds whole records. Raises OSError when the disk is full."""

    def __init__(self, ranges: Sequence[ScopeRange]) -> None:
        # Scopes are ASCII: text, bytes and ClickHouse sort them alike.
        self._untils = [each.until.encode() for each in ranges if each.until is not None]
        self._buffers = [bytearray() for _ in ranges]
        self._pieces: list[list[tuple[int, int]]] = [[] for _ in ranges]
        self._end = 0
        self._file = tempfile.TemporaryFile(prefix="metering-reconcile-", buffering=0)  # noqa: SIM115

    def __enter__(self) -> ScopeSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, scope: bytes, record: bytes) -> None:
        """Put a record into its scope's range; all are added before the first is read."""
        number = bisect_left(self._untils, scope)
        buffer = self._buffers[number]
        buffer += record
        if len(buffer) >= BUFFER_BYTES:
            self._write(number)

    def _write(self, number: int) -> None:
        buffer = self._buffers[number]
        written = 0
        self._file.seek(self._end)
        while written < len(buffer):
            written += self._file.write(bytes(buffer[written:])) or 0
        self._pieces[number].append((self._end, len(buffer)))
        self._end += len(buffer)
        buffer.clear()

    def pieces(self, number: int) -> Iterator[bytes]:
        """The records of a range, some at a time, in the order in which they were added."""
        for start, length in self._pieces[number]:
            self._file.seek(start)
            piece = b""
            while len(piece) < length:
                read = self._file.read(length - len(piece))
                if not read:
                    raise OSError("a temporary file lost its end")
                piece += read
            yield piece
        if self._buffers[number]:
            yield bytes(self._buffers[number])
