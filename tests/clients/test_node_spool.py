"""The node's disk spool: what a kill, a torn end, damage and a full disk leave of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clients.node import NotDurable, Refusal, RefusalReason, SpoolInUse, UsageEmitter
from clients.node.spool import Record, Spool, encode_record
from tests.support.node_client import spooled_values
from tests.support.processes import wait_until

NOBODY = "127.0.0.1:9"
MAX_BYTES = 64 * 1024


def lines(first: int, count: int) -> list[bytes]:
    """Records of some 250 bytes with numbers for values."""
    return [
        encode_record(1000 + number, b"session/s", b'{"n":%d,"pad":"%b"}' % (number, b"x" * 200))
        for number in range(first, first + count)
    ]


def numbers(records: list[Record]) -> list[int]:
    """The numbers of the undamaged ones."""
    return [json.loads(record.value)["n"] for record in records if record.damaged is None]


def read_all(spool: Spool) -> list[Record]:
    """From the read position to the end."""
    found: list[Record] = []
    while batch := spool.read(7):
        found += batch
    return found


@contextmanager
def opened(directory: Path, max_bytes: int = MAX_BYTES) -> Iterator[Spool]:
    """A spool, closed at the end."""
    spool = Spool(directory, max_bytes)
    try:
        yield spool
    finally:
        spool.close()


def segments(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("*.seg"))


def aside(directory: Path) -> list[dict[str, str]]:
    """What is set aside."""
    path = directory / "aside.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_records_come_back_in_order_over_many_segments_and_restarts(tmp_path: Path) -> None:
    """What was acknowledged does not come again, what was only read does; sent segments are deleted."""
    with opened(tmp_path) as spool:
        for first in range(0, 100, 10):
            spool.append(lines(first, 10))
        assert len(segments(tmp_path)) > 3
        records = read_all(spool)
        assert numbers(records) == list(range(100))
        spool.acknowledge(records[54].end, 55)
        assert spool.events == 45
        spool.rewind()
        assert numbers(read_all(spool)) == list(range(55, 100))
    with opened(tmp_path) as spool:
        assert (spool.events, spool.recovered) == (45, 45)
        spool.append(lines(100, 5))
        records = read_all(spool)
        assert numbers(records) == list(range(55, 105))
        spool.acknowledge(records[-1].end, 50)
        assert spool.events == 0
        assert spool.disk_bytes == sum(path.stat().st_size for path in segments(tmp_path))
    with opened(tmp_path) as spool:
        assert read_all(spool) == []
        assert segments(tmp_path) == []


def test_records_are_not_read_before_they_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash could take back what the broker already has; and a sync that failed is repeated elsewhere."""

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as spool:
        spool.append(lines(0, 2))
        with monkeypatch.context() as patch:
            patch.setattr("clients.node.spool._sync", full)
            with pytest.raises(OSError, match="No space left"):
                spool.append(lines(2, 3))
        assert numbers(read_all(spool)) == [0, 1]
        spool.append(lines(2, 3))
        assert numbers(read_all(spool)) == [2, 3, 4]
        assert spool.events == 5
    with opened(tmp_path) as spool:
        assert numbers(read_all(spool)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 100, 237])
def test_a_torn_end_is_cut_off_and_kept(tmp_path: Path, cut: int) -> None:
    """Half a record at the end was never promised; the ones before it are all there, and new ones follow."""
    with opened(tmp_path) as spool:
        spool.append(lines(0, 5))
    (segment,) = segments(tmp_path)
    whole = segment.read_bytes()
    last = lines(4, 1)[0]
    segment.write_bytes(whole[: len(whole) - cut])
    with opened(tmp_path) as spool:
        assert spool.torn_bytes == len(last) - cut
        assert spool.events == 4
        spool.append(lines(5, 1))
        assert numbers(read_all(spool)) == [0, 1, 2, 3, 5]
    (entry,) = aside(tmp_path)
    assert entry["reason"] == "torn end"
    assert b64decode(entry["damaged_base64"]) == last[: len(last) - cut]


@pytest.mark.parametrize("where", ["checksum", "value", "line break", "last line break"])
def test_damage_costs_the_records_it_hits(tmp_path: Path, where: str) -> None:
    """The others come in order; the damaged bytes come as such, whole, and none is taken for an event."""
    with opened(tmp_path) as spool:
        spool.append(lines(0, 6))
    (segment,) = segments(tmp_path)
    data = bytearray(segment.read_bytes())
    size = len(lines(0, 1)[0])
    at = {"checksum": 2 * size + 3, "value": 2 * size + 60, "line break": 3 * size - 1, "last line break": -1}
    data[at[where]] ^= 0x20
    segment.write_bytes(data)
    with opened(tmp_path) as spool:
        records = read_all(spool)
        expected = {
            "checksum": [0, 1, 3, 4, 5],
            "value": [0, 1, 3, 4, 5],
            "line break": [0, 1, 4, 5],
            "last line break": [0, 1, 2, 3, 4],
        }
        assert numbers(records) == expected[where]
        damaged = [record.damaged for record in records if record.damaged is not None]
        damaged += [b64decode(entry["damaged_base64"]) for entry in aside(tmp_path)]
        kept = b"".join(damaged)
        assert len(kept) in (size - 1, 2 * size - 1, size)
        assert bytes(data).find(kept) >= 0
        spool.acknowledge(records[-1].end, len(records))
    with opened(tmp_path) as spool:
        assert read_all(spool) == []


@pytest.mark.parametrize("cut_to", [None, 300])
def test_a_file_that_vanishes_while_in_use_does_not_stop_the_rest(tmp_path: Path, cut_to: int | None) -> None:
    """What is gone is reported once as damaged; reading goes on with the next segment."""
    with opened(tmp_path) as spool:
        for first in range(0, 40, 20):
            spool.append(lines(first, 20))
        first_segment = segments(tmp_path)[0]
        if cut_to is None:
            first_segment.unlink()
        else:
            os.truncate(first_segment, cut_to)
        records = read_all(spool)
        assert numbers(records) == ([] if cut_to is None else [0]) + list(range(20, 40))
        assert sum(record.damaged is not None for record in records) >= 1


@pytest.mark.parametrize("content", [b"", b"0", b"deadbeef 1 500", b"\0" * 64])
def test_a_lost_or_broken_position_sends_again_and_loses_nothing(tmp_path: Path, content: bytes) -> None:
    """From the oldest segment that is there; and segment numbers go on."""
    with opened(tmp_path) as spool:
        spool.append(lines(0, 30))
        spool.append(lines(30, 10))
        records = read_all(spool)
        spool.acknowledge(records[34].end, 35)
    before = segments(tmp_path)
    (tmp_path / "position").write_bytes(content)
    with opened(tmp_path) as spool:
        assert numbers(read_all(spool)) == list(range(30, 40))
        spool.append(lines(40, 1))
        assert segments(tmp_path)[-1].name > before[-1].name
        assert numbers(read_all(spool)) == [40]


def test_a_segment_number_is_never_used_twice(tmp_path: Path) -> None:
    """Otherwise the position of a sent segment would hide the new one of that number."""
    for first in range(0, 12, 3):
        with opened(tmp_path) as spool:
            spool.append(lines(first, 3))
            records = read_all(spool)
            assert numbers(records) == [first, first + 1, first + 2]
            spool.acknowledge(records[-1].end, 3)
        with opened(tmp_path) as spool:
            assert segments(tmp_path) == []


def test_one_directory_belongs_to_one_emitter(tmp_path: Path) -> None:
    """A second one is refused by name, in this process and in another; afterwards the directory is free."""
    with UsageEmitter(NOBODY, "n-1", tmp_path, exit_timeout_s=0.0):
        with pytest.raises(
            SpoolInUse, match=f"{tmp_path}: another emitter has this spool, in process {os.getpid()}"
        ):
            UsageEmitter(NOBODY, "n-1", tmp_path)
        code = f"from clients.node import UsageEmitter; UsageEmitter({NOBODY!r}, 'n-1', {str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"SpoolInUse: {tmp_path}: another emitter has this spool" in other.stderr
    UsageEmitter(NOBODY, "n-1", tmp_path).close(0.0)


def test_a_killed_process_leaves_the_directory_free(tmp_path: Path) -> None:
    """The lock ends with the process, however it ends."""
    code = (
        "import time; from clients.node import UsageEmitter\n"
        f"emitter = UsageEmitter({NOBODY!r}, 'n-1', {str(tmp_path)!r})\n"
        "emitter.room_joined(room_id='r-1', user_id='u-1', durable=True)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.kill()
    child.wait()
    child.stdout.close()
    with UsageEmitter(NOBODY, "n-1", tmp_path, exit_timeout_s=0.0) as emitter:
        assert (emitter.stats().recovered, emitter.stats().spooled) == (1, 1)


def emit(emitter: UsageEmitter, number: int, durable_timeout_s: float | None = None) -> None:
    """One utterance with a number in its id; durable if it is told how long to wait."""
    with emitter.utterance(
        session_id="s-1",
        user_id="u-1",
        utterance_id=f"ut-{number}",
        durable=durable_timeout_s is not None,
        durable_timeout_s=durable_timeout_s or 0.0,
    ) as spoken:
        spoken.add_ms(asr=1)


def test_a_full_spool_refuses_the_newest_aloud_and_keeps_what_it_promised(tmp_path: Path) -> None:
    """Each refused event is counted and handed over, whole; the others are on the disk, within the bound."""
    refused: list[Refusal] = []
    with UsageEmitter(
        NOBODY, "n-1", tmp_path, spool_bytes=MAX_BYTES, on_refused=refused.append, exit_timeout_s=0.0
    ) as emitter:
        for number in range(400):
            emit(emitter, number)
        with pytest.raises(NotDurable, match="session/s-1: refused, spool_full"):
            emit(emitter, 400, durable_timeout_s=10.0)
        stats = emitter.stats()
        assert stats.emitted + len(refused) == 401
        assert stats.refused == {RefusalReason.SPOOL_FULL: len(refused)}
        assert len(refused) > 100
    found = spooled_values(tmp_path)
    kept = [json.loads(value)["data"]["utterance_id"] for value in found]
    lost = [json.loads(refusal.value)["data"]["utterance_id"] for refusal in refused]
    assert len(found) == stats.emitted
    assert sorted(kept + lost) == sorted(f"ut-{number}" for number in range(401))
    # The oldest were promised already: what was refused came last.
    assert kept[:50] == [f"ut-{number}" for number in range(50)]
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= MAX_BYTES


def test_a_disk_that_fails_is_tried_again_and_a_full_queue_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the events wait in memory, up to its bound; when the disk is back all of them get there."""
    refused: list[Refusal] = []
    broken = True
    real = os.fsync

    def sync(descriptor: int) -> None:
        if broken:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr("clients.node.spool._sync", sync)
    with UsageEmitter(
        NOBODY, "n-1", tmp_path, queue_bytes=10_000, on_refused=refused.append, exit_timeout_s=0.0
    ) as emitter:
        with pytest.raises(NotDurable, match=r"not on the disk after 0\.01 s; it may still be sent"):
            emit(emitter, 0, durable_timeout_s=0.01)
        for number in range(1, 60):
            emit(emitter, number)
        wait_until(lambda: emitter.stats().disk_errors > 1, "the disk is tried twice")
        stats = emitter.stats()
        assert "Input/output error" in stats.last_error
        assert stats.queued == stats.emitted
        assert stats.refused == {RefusalReason.QUEUE_FULL: 60 - stats.queued}
        assert spooled_values(tmp_path) == []
        broken = False
        wait_until(lambda: emitter.stats().queued == 0, "the disk has all of it")
    kept = [json.loads(value)["data"]["utterance_id"] for value in spooled_values(tmp_path)]
    assert kept == [f"ut-{number}" for number in range(60 - len(refused))]


def test_a_disk_that_fails_until_the_end_tells_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not hang, and every event in memory is handed over."""
    refused: list[Refusal] = []

    def sync(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("clients.node.spool._sync", sync)
    with UsageEmitter(NOBODY, "n-1", tmp_path, on_refused=refused.append, exit_timeout_s=0.2) as emitter:
        for number in range(5):
            emit(emitter, number)
    assert [json.loads(refusal.value)["data"]["utterance_id"] for refusal in refused] == [
        f"ut-{number}" for number in range(5)
    ]
    assert {refusal.reason for refusal in refused} == {RefusalReason.CLOSED}
    assert "Input/output error" in refused[0].detail


def test_a_real_full_disk_is_refused_and_healed(tmp_path: Path) -> None:
    """A file size limit makes write() fail half-way: no half record stays, and nothing is lost or doubled."""

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with opened(tmp_path) as spool:
            spool.append(lines(0, 4))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_200, hard))
            with pytest.raises(OSError, match="File too large"):
                spool.append(lines(4, 6))
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            spool.append(lines(4, 6))
            assert numbers(read_all(spool)) == list(range(10))

    run_forked(child)
    with opened(tmp_path) as spool:
        assert spool.torn_bytes == 0
        assert numbers(read_all(spool)) == list(range(10))


def run_forked(work: Callable[[], None]) -> None:
    """In a child of its own, since limits cannot always be raised again; its failure is this one's."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as problem:
            os.write(2, f"{type(problem).__name__}: {problem}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_callback_that_raises_disturbs_nobody(tmp_path: Path) -> None:
    """It is counted."""

    def raises(_refusal: Refusal) -> None:
        raise KeyError("callback")

    with UsageEmitter(
        NOBODY, "n-1", tmp_path, queue_bytes=1, on_refused=raises, exit_timeout_s=0.0
    ) as emitter:
        emit(emitter, 1)
        assert emitter.stats().callback_errors == 1
        assert emitter.stats().refused == {RefusalReason.QUEUE_FULL: 1}


def test_a_forked_child_is_told_to_make_its_own_and_ends_in_peace(tmp_path: Path) -> None:
    """It neither sends nor holds the parent's lock; the parent goes on."""
    code = f"""
import os, sys, time
from clients.node import UsageEmitter
emitter = UsageEmitter({NOBODY!r}, "n-1", {str(tmp_path / "parent")!r}, exit_timeout_s=0.0)
spoken = emitter.utterance(session_id="s", user_id="u")
spoken.__enter__()
spoken.add_ms(asr=1)
emitter.room_closed(room_id="r-0", durable=True)
child = os.fork()
if child == 0:
    try:
        emitter.room_closed(room_id="r-1")
    except RuntimeError as problem:
        assert "after a fork make another one" in str(problem)
        spoken.__exit__(None, None, None)
        assert sum(emitter.stats().refused.values()) == 1
        own = UsageEmitter({NOBODY!r}, "n-1", {str(tmp_path / "child")!r}, exit_timeout_s=0.0)
        own.room_closed(room_id="r-2")
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
emitter.room_closed(room_id="r-3")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, result.stderr if result.returncode == 0 else "")
    rooms = {
        name: [json.loads(value)["data"]["room_id"] for value in spooled_values(tmp_path / name)]
        for name in ("parent", "child")
    }
    # Neither was closed by hand: the clean-up at the interpreter's exit stored what was in memory.
    assert rooms == {"parent": ["r-0", "r-3"], "child": ["r-2"]}
