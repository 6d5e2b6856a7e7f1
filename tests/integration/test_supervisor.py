"""`metering up` on real servers, with stand-ins for the flows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from app.embedded import broker, clickhouse
from tests.support.processes import children, running, wait_until
from tests.support.services import chosen_broker

ROOT = Path(__file__).resolve().parents[2]


class Up:
    """A running supervisor, seen from outside."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.stderr = directory.with_suffix(".stderr")
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.stand_in_up", str(directory), *options],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def wait_ready(self) -> dict[str, str]:
        """The addresses that it printed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        addresses: dict[str, str] = json.loads(line)
        return addresses

    def child(self, part_of_command: str) -> int:
        """The process id of the one child whose command line has these words."""
        [pid] = [pid for pid, line in children(self.process.pid).items() if part_of_command in line]
        return pid

    def has_other_child(self, part_of_command: str, than: int) -> bool:
        """Whether another process has taken the place of `than`."""
        lines = children(self.process.pid)
        return any(part_of_command in line for pid, line in lines.items() if pid != than)

    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self.stderr.read_text()

    def hooks(self) -> list[str]:
        """Which preparations ran, in order."""
        return (self.directory / "hooks.log").read_text().splitlines()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it, and give its exit code and what else it wrote to standard output."""
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, rest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts supervisors on one directory, and sees to it that none outlives the test."""
    with ExitStack() as stack:

        def start_one(*options: str) -> Up:
            up = Up(tmp_path / "up", *options)
            stack.callback(up.process.wait)
            stack.callback(up.process.kill)
            return up

        yield start_one


def test_it_starts_stops_and_comes_back(start: Callable[..., Up]) -> None:
    """One JSON line when all is ready; SIGTERM ends all; the next start has the addresses and the data."""
    kind = chosen_broker()
    up = start("--broker", kind)
    addresses = up.wait_ready()
    assert broker.kafka_answers(int(addresses["kafka"].partition(":")[2]))
    assert clickhouse.clickhouse_answers(urlsplit(addresses["clickhouse"]).port or 0)
    redis.Redis.from_url(addresses["redis"]).set("kept", "yes")
    assert up.hooks() == ["stores with 0 readers", "topics with 0 readers"]
    everyone = [up.process.pid, *children(up.process.pid)]
    assert len(everyone) == 6
    assert up.stop() == (0, "")
    assert [pid for pid in everyone if running(pid)] == []

    again = start("--broker", kind)
    assert again.wait_ready() == addresses
    assert redis.Redis.from_url(addresses["redis"]).get("kept") == b"yes"
    adopted = ["adopt with 0 readers"] if kind == "tansu" else []
    assert again.hooks()[2:] == ["stores with 0 readers", "topics with 0 readers", *adopted]


def test_what_ends_is_started_again(start: Callable[..., Up]) -> None:
    """A killed flow is back at once, a killed server too, and both are said."""
    up = start()
    addresses = up.wait_ready()
    for name, command in (("reader", "stand_in_flow reader"), ("redis", "valkey-server")):
        killed = up.child(command)
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: up.has_other_child(command, than=killed), f"another {name}")  # noqa: B023
        # It takes 0.3 s; the rest is for a busy machine.
        assert time.monotonic() - began < 3.0
        assert f"metering up: {name} ended (SIGKILL), starting it again in 0.2 s\n" in up.said()
    port = urlsplit(addresses["redis"]).port
    wait_until(lambda: redis_pings(port), "Redis answers again")
    assert up.stop()[0] == 0


def test_a_flow_that_keeps_ending_is_started_more_and_more_rarely(start: Callable[..., Up]) -> None:
    """The pause doubles with every end in a row."""
    up = start()
    up.wait_ready()
    for pause in ("0.2", "0.4", "0.8"):
        killed = up.child("stand_in_flow other")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: up.has_other_child("stand_in_flow other", than=killed), "another flow")  # noqa: B023
        assert f"other ended (SIGKILL), starting it again in {pause} s\n" in up.said()


def test_a_lost_log_is_adopted_before_anyone_reads_it(start: Callable[..., Up]) -> None:
    """When the embedded broker ends, its readers wait until topics and books are ready for the fresh one."""
    up = start()
    address = up.wait_ready()["kafka"]
    reader, other = up.child("stand_in_flow reader"), up.child("stand_in_flow other")
    os.kill(up.child("tansu"), signal.SIGKILL)
    wait_until(lambda: up.has_other_child("stand_in_flow reader", than=reader), "another reader")
    assert up.hooks()[2:] == ["topics with 0 readers", "adopt with 0 readers"]
    assert up.child("stand_in_flow other") == other
    assert not running(reader)
    assert broker.kafka_answers(int(address.partition(":")[2]))
    assert "the broker's log is lost: stopping reader\n" in up.said()
    assert "going on with a fresh log" in up.said()


def test_a_killed_supervisor_takes_everyone_along(start: Callable[..., Up]) -> None:
    """SIGKILL leaves no process behind, and the directory can be used again at once."""
    up = start("--behaviour", "stubborn")
    addresses = up.wait_ready()
    everyone = list(children(up.process.pid))
    assert len(everyone) == 5
    up.stop(signal.SIGKILL)
    again = start()
    assert again.wait_ready() == addresses
    assert [pid for pid in everyone if running(pid)] == []


def test_a_directory_has_one_supervisor(start: Callable[..., Up]) -> None:
    """A second one is refused with one line that names the first, which goes on."""
    up = start()
    up.wait_ready()
    already_said = up.said()
    second = start()
    assert second.process.wait(60) == 2
    line = up.said().removeprefix(already_said)
    assert line == f"metering: {up.directory} is in use by process {up.process.pid}\n"
    assert up.process.poll() is None


def test_a_flow_that_cannot_start_ends_it_all(start: Callable[..., Up]) -> None:
    """After three attempts the flow's own last line is the reason, and nothing stays behind."""
    up = start("--behaviour", "broken")
    assert up.process.stdout is not None
    assert up.process.stdout.read() == ""
    assert up.process.wait(60) == 1
    last = up.said().splitlines()[-1]
    assert last == "metering: other does not start (exit code 1): other: the rate card is upside down"
    assert leftovers(up.directory) == []


def test_a_flow_that_ignores_sigterm_is_killed(start: Callable[..., Up]) -> None:
    """After the deadline SIGKILL ends it, and the supervisor ends well all the same."""
    up = start("--behaviour", "stubborn")
    up.wait_ready()
    assert up.stop() == (0, "")
    assert "other did not stop within 1 s: killing it\n" in up.said()
    assert leftovers(up.directory) == []


def test_it_can_be_stopped_while_it_starts(start: Callable[..., Up]) -> None:
    """SIGTERM in the middle of a long preparation ends it soon, with nothing printed."""
    up = start("--slow-topics")
    wait_until(lambda: (up.directory / "hooks.log").exists() and len(up.hooks()) == 2, "the preparation")
    assert up.stop() == (0, "")
    assert leftovers(up.directory) == []


def redis_pings(port: int | None) -> bool:
    """Whether Redis answers."""
    try:
        return bool(redis.Redis(port=port or 0).ping())
    except redis.ConnectionError:
        return False


def leftovers(directory: Path) -> list[str]:
    """Running processes that hold something of the directory open: the children inherit its lock."""
    found = []
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [str(link.readlink()) for link in descriptors.iterdir()]
        except OSError:
            continue
        if any(target.startswith(f"{directory}/") for target in targets):
            found.append(descriptors.parent.name)
    return found
