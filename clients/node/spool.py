"""The disk spool: events that the broker has not acknowledged yet, in the order in which they were made.

A directory of segment files that are only ever appended to, one record a line:

    <CRC-32 of the rest, 8 hex digits> <ms since the Unix epoch> <key> <the event, one line of JSON>

A line break cannot occur within a record, so after damage reading goes on at the next line. Not SQLite:
an append and one fdatasync a batch is all that is needed, the bound in bytes is exact, and damage costs the
records it hits and not the file.

The laws, and what a crash between any two effects does.

1. `append` writes, syncs, and returns. What it returned for survives a kill and a loss of power. A kill before
   that may leave the beginning of the batch, and half a record at its end; opening cuts off the half record.
   The whole records before it are sent: they are events that were made.
2. Only synced records are read, so nothing is sent that a crash could take back.
3. `acknowledge` first notes the position, then deletes segments that are wholly before it. The note is written
   in place and not synced. Lost, torn, or older than the truth, it makes records be sent again, with the same
   bytes. It is never ahead of the truth, because a segment's number is never used twice: a new one is greater
   than every segment's and than the note's.
4. A record that is set aside is written and synced to `aside.jsonl` before the position moves past it. A kill
   between the two sets it aside twice.
5. A write that fails (a full disk) leaves the segment behind, cut to its last synced byte, and raises. The
   caller still has the records, and the next `append` starts another segment.
6. One process at a time: a lock on the file `lock` that ends with the process, however it ends.

`append` is for one thread, `read` and `acknowledge` for one other.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

Position = tuple[int, int]
"""(segment number, byte offset)."""

SEGMENTS = 16
"""About how many segments make a full spool; a segment is deleted as a whole, when all of it was sent."""

_SEGMENT_NAME = re.compile(r"([0-9]{8,18})\.seg")
_MAX_SEGMENT_BYTES = 4 * 1024 * 1024
_MIN_SEGMENT_BYTES = 4 * 1024
_READ_BYTES = 256 * 1024
_POSITION_BYTES = 64
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
_sync = getattr(os, "fdatasync", os.fsync)


class SpoolInUse(RuntimeError):
    """Another process, or another emitter of this one, has the spool directory."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the spool."""

    start: Position
    end: Position
    made_ms: int
    key: bytes
    value: bytes
    damaged: bytes | None = None
    """The line, if it is not what was written; then there is no key and no value."""


def encode_record(made_ms: int, key: bytes, value: bytes) -> bytes:
    """The line, with its line break."""
    rest = b"%d %b %b" % (made_ms, key, value)
    return b"%08x %b\n" % (crc32(rest), rest)


def decode_record(line: bytes, start: Position, end: Position) -> Record:
    """The record of a line without its line break; a damaged one if the line is not what was written."""
    checksum, _, rest = line.partition(b" ")
    if checksum == b"%08x" % crc32(rest):
        made_ms, _, message = rest.partition(b" ")
        key, _, value = message.partition(b" ")
        if made_ms.isdigit() and key and value:
            return Record(start, end, int(made_ms), key, value)
    return Record(start, end, 0, b"", b"", damaged=line)


class Spool:
    """The spool in `directory`, which is made if missing.

    Opening reads what is there once, to count it. Raises SpoolInUse, and OSError when the directory cannot be
    used.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self.segment_bytes = min(max(max_bytes // SEGMENTS, _MIN_SEGMENT_BYTES), _MAX_SEGMENT_BYTES)
        self._mutex = threading.Lock()
        self._ends: dict[int, int] = {}
        """How far each segment is synced, so how far it may be read."""
        self._position_fd = self._active_fd = self._reading_fd = -1
        self._active = self._reading = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._lock_fd = _lock(directory)
        try:
            self.torn_bytes = 0
            """Cut off at opening: half a record that was being written when the last process died."""
            self.disk_bytes = _size(directory / "aside.jsonl")
            """What the files take, with what is set aside; a segment that is sent in part counts whole."""
            self._position_fd = os.open(directory / "position", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._acknowledged = self._read_position()
            self._last = self._recover()
            self._read_from = self._acknowledged
            self.events = self._count()
            """Records that are not acknowledged."""
            self.recovered = self.events
            """How many of them the last process left."""
        except BaseException:
            self.close()
            raise

    def append(self, lines: Sequence[bytes]) -> None:
        """Store encoded records; when it returns they are on the disk. Blocks for one write and one sync.

        Raises OSError when they are not; then the same records may be appended again.
        """
        if self._active_fd < 0:
            self._start_segment()
        size = self._ends[self._active]
        data = b"".join(lines)
        try:
            _write(self._active_fd, data)
            _sync(self._active_fd)
        except OSError:
            # After a sync that failed nobody knows what is on the disk: never write to this file again.
            with suppress(OSError):
                os.ftruncate(self._active_fd, size)
            self._leave_segment()
            raise
        with self._mutex:
            self._ends[self._active] = size + len(data)
            self.disk_bytes += len(data)
            self.events += len(lines)
        if size + len(data) >= self.segment_bytes:
            self._leave_segment()

    def read(self, max_records: int) -> list[Record]:
        """The next records, at most `max_records`; none at the end. Damaged ones are among them."""
        segment, offset = self._read_from
        with self._mutex:
            if offset >= self._ends.get(segment, 0):
                later = [number for number, end in self._ends.items() if number > segment and end]
                if not later:
                    return []
                segment, offset = min(later), 0
            end = self._ends[segment]
        chunk = self._read_chunk(segment, offset, end)
        records = []
        at = 0
        if not chunk:
            # Somebody took the file away, or cut it, while it was in use. What was in it is gone.
            records.append(Record((segment, offset), (segment, end), 0, b"", b"", damaged=b""))
        while len(records) < max_records and at < len(chunk):
            # The very last line break may be what was damaged.
            after = chunk.find(b"\n", at) + 1 or len(chunk)
            line = chunk[at:after].removesuffix(b"\n")
            records.append(decode_record(line, (segment, offset + at), (segment, offset + after)))
            at = after
        self._read_from = records[-1].end
        return records

    def rewind(self) -> None:
        """Read from the last acknowledged record on."""
        self._read_from = self._acknowledged

    def acknowledge(self, position: Position, count: int) -> None:
        """The `count` records up to `position` are delivered, or set aside. Does not sync, does not raise."""
        self._acknowledged = position
        line = b"%d %d" % position
        with suppress(OSError):
            os.pwrite(self._position_fd, (b"%08x %b" % (crc32(line), line)).ljust(_POSITION_BYTES), 0)
        with self._mutex:
            self.events = max(0, self.events - count)
            done = [
                number
                for number, end in self._ends.items()
                if number != self._active and (number < position[0] or (number, end) == position)
            ]
            for number in done:
                self.disk_bytes -= self._ends.pop(number)
        for number in done:
            with suppress(OSError):
                self._path(number).unlink()

    def set_aside(self, reason: str, record: Record, now_ms: int) -> None:
        """Keep the record in `aside.jsonl` for a person to look at. Blocks for a sync; raises OSError."""
        entry: dict[str, str | int] = {"at_ms": now_ms, "reason": reason}
        if record.damaged is None:
            entry |= {"key": record.key.decode(), "value": record.value.decode()}
        else:
            entry |= {"damaged_base64": b64encode(record.damaged).decode()}
        line = json.dumps(entry).encode() + b"\n"
        path = self._directory / "aside.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _write(descriptor, line)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        _sync_directory(self._directory)
        with self._mutex:
            self.disk_bytes += len(line)

    def close(self) -> None:
        """Give the directory free. Both threads must have ended."""
        for descriptor in (self._active_fd, self._reading_fd, self._position_fd, self._lock_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._active_fd = self._reading_fd = self._position_fd = self._lock_fd = -1

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}.seg"

    def _recover(self) -> int:
        """Drop what was sent, cut off what is torn. Returns the greatest segment number that was ever used."""
        numbers = sorted(
            int(match[1])
            for entry in self._directory.iterdir()
            if (match := _SEGMENT_NAME.fullmatch(entry.name))
        )
        for number in numbers:
            if number < self._acknowledged[0]:
                self._path(number).unlink()
                continue
            size = self._cut_torn_end(number)
            if size == 0 or (number, size) == self._acknowledged:
                self._path(number).unlink()
            else:
                self._ends[number] = size
                self.disk_bytes += size
        segment, offset = self._acknowledged
        if offset > self._ends.get(segment, offset):
            # The file is shorter than what was sent of it, so it is another one.
            self._acknowledged = (segment, 0)
        return max([segment, *numbers])

    def _cut_torn_end(self, number: int) -> int:
        """The size after the cut. What is cut off is set aside first: it might be damage and no torn end."""
        with self._path(number).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            whole = size
            while whole:
                start = max(0, whole - _READ_BYTES)
                file.seek(start)
                found = file.read(whole - start).rfind(b"\n")
                if found >= 0:
                    whole = start + found + 1
                    break
                whole = start
            if whole < size:
                file.seek(whole)
                torn = Record((number, whole), (number, size), 0, b"", b"", damaged=file.read())
                self.set_aside("torn end", torn, now_ms())
                self.torn_bytes += size - whole
                file.truncate(whole)
                os.fsync(file.fileno())
            return whole

    def _count(self) -> int:
        count = 0
        for number in self._ends:
            with self._path(number).open("rb") as file:
                if number == self._acknowledged[0]:
                    file.seek(self._acknowledged[1])
                while chunk := file.read(_READ_BYTES):
                    count += chunk.count(b"\n")
        return count

    def _read_position(self) -> Position:
        written = os.pread(self._position_fd, _POSITION_BYTES, 0).strip()
        checksum, _, line = written.partition(b" ")
        if not line or checksum != b"%08x" % crc32(line):
            return (0, 0)
        segment, _, offset = line.partition(b" ")
        return (int(segment), int(offset))

    def _start_segment(self) -> None:
        self._last += 1
        number = self._last
        descriptor = os.open(self._path(number), _NEW_FILE, 0o644)
        try:
            # The name must be on the disk before anything in the file counts as stored.
            _sync_directory(self._directory)
        except OSError:
            os.close(descriptor)
            raise
        with self._mutex:
            self._active = number
            self._ends[number] = 0
        self._active_fd = descriptor

    def _leave_segment(self) -> None:
        os.close(self._active_fd)
        self._active_fd = -1
        with self._mutex:
            number, self._active = self._active, 0
            # Nothing is ever acknowledged in an empty segment, so nothing else would delete it.
            empty = self._ends[number] == 0
            if empty:
                del self._ends[number]
        if empty:
            with suppress(OSError):
                self._path(number).unlink()

    def _read_chunk(self, segment: int, offset: int, end: int) -> bytes:
        """Whole lines from there on, some 256 KiB of them, or one line if that is longer.

        Nothing, or a line without its end, only when the file is not what was written.
        """
        if segment != self._reading:
            if self._reading_fd >= 0:
                os.close(self._reading_fd)
                self._reading, self._reading_fd = 0, -1
            try:
                self._reading_fd = os.open(self._path(segment), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
            self._reading = segment
        size = _READ_BYTES
        while True:
            chunk = os.pread(self._reading_fd, min(size, end - offset), offset)
            last = chunk.rfind(b"\n")
            if last >= 0:
                return chunk[: last + 1]
            if size >= end - offset:
                return chunk
            size *= 2


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise SpoolInUse(
            f"{directory}: another emitter has this spool, in process {holder or 'unknown'}; "
            "give each process a directory of its own"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def now_ms() -> int:
    """The wall clock, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000
