"""Keeps programs running, and can kill, stop, hold down and arm them. Single-threaded: call `pump` often.

The kernel ties a child to the thread that started it (`app.embedded.process`), so all of this belongs to the main
thread, and whoever waits for something waits in `wait_until`, which keeps restarting what has died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.embedded import process

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 4.0
"""Before a program that gave up by itself, again and again, is started once more. Who was killed starts at once."""
STEADY_AFTER_S = 30.0


class Stuck(Exception):
    """Something that must happen did not happen in time. One line."""


@dataclass
class Child:
    """One program that is to run."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    group: str = ""
    """Members of a group live and die together: one process of a Bytewax cluster is nothing without the others."""
    before_start: Callable[[], object] | None = None
    running: subprocess.Popen[bytes] | None = None
    held: bool = False
    """It must not run for now."""
    armed: Mapping[str, str] = field(default_factory=dict)
    """Environment of its next start only."""
    started_at: float = 0.0
    start_at: float = 0.0
    pause_s: float = 0.0


class Keeper:
    """Children by name. `ended` counts what nobody here asked for: (name, how) -> times."""

    def __init__(self) -> None:
        self._children: dict[str, Child] = {}
        self.ended: Counter[tuple[str, str]] = Counter()
        self.last_outcome: dict[str, str] = {}
        """How each child ended last, by name."""
        self.endings: Counter[str] = Counter()
        """How often each child ended, whoever wanted it."""

    @property
    def names(self) -> list[str]:
        """Of the children, in the order in which they were added."""
        return list(self._children)

    def add(self, child: Child) -> None:
        """Start it now, and again whenever it ends."""
        self._children[child.name] = child
        self._start(child)

    def _start(self, child: Child) -> None:
        if child.before_start is not None:
            child.before_start()
        environment = {**child.environment, **child.armed}
        child.armed = {}
        child.started_at = time.monotonic()
        child.running = process.spawn(child.argv, environment, child.log)

    def pump(self) -> None:
        """Notice who has ended and start who is due. Never blocks."""
        now = time.monotonic()
        for child in list(self._children.values()):
            if child.running is not None and child.running.poll() is not None:
                self._note_end(child, now)
        for child in self._children.values():
            if child.running is None and not child.held and child.start_at <= now:
                self._start(child)

    def _note_end(self, child: Child, now: float) -> None:
        assert child.running is not None
        how = process.outcome(child.running)
        self.last_outcome[child.name] = how
        self.endings[child.name] += 1
        if how != signal.SIGKILL.name:
            self.ended[child.name, how] += 1
        for member in self._group(child):
            if member.running is not None:
                process.stop(member.running, deadline_s=0)
                gave_up = how != signal.SIGKILL.name and now - member.started_at < STEADY_AFTER_S
                member.pause_s = (
                    min(max(2 * member.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S) if gave_up else 0.0
                )
                member.start_at = now + member.pause_s
                member.running = None

    def _group(self, child: Child) -> list[Child]:
        if not child.group:
            return [child]
        return [other for other in self._children.values() if other.group == child.group]

    def pid(self, name: str) -> int | None:
        """Of the running child."""
        running = self._children[name].running
        return None if running is None or running.poll() is not None else running.pid

    def await_pid(self, name: str) -> int:
        """Of the child, as soon as it runs. Raises Stuck."""
        self.wait_until(lambda: self.pid(name) is not None, f"{name} runs", 60.0)
        pid = self.pid(name)
        assert pid is not None
        return pid

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal, as soon as the child runs."""
        os.kill(self.await_pid(name), number)

    def arm(self, name: str, environment: Mapping[str, str]) -> None:
        """Give the next start of the child, and no later one, this on top of its environment."""
        self._children[name].armed = environment

    def hold(self, name: str) -> None:
        """Do not start it again until `release`."""
        self._children[name].held = True

    def release(self, name: str) -> None:
        """Start it again."""
        child = self._children[name]
        child.held = False
        child.start_at = 0.0

    def wait_until(
        self, condition: Callable[[], object], what: str, timeout_s: float, every_s: float = 0.05
    ) -> None:
        """Return once the condition holds, keeping everything running meanwhile. Raises Stuck."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.pump()
            if condition():
                return
            if time.monotonic() > deadline:
                raise Stuck(f"{what}: not within {timeout_s:g} s")
            time.sleep(every_s)

    def sleep(self, seconds: float) -> None:
        """Let time pass, keeping everything running."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.pump()
            time.sleep(min(left, 0.05))

    def remove(self, names: list[str], deadline_s: float = 10.0) -> None:
        """End these for good: ask all of them, and kill whoever is left."""
        leaving = [self._children.pop(name) for name in names]
        running = [child.running for child in leaving if child.running is not None]
        for one in running:
            if one.poll() is None:
                one.send_signal(signal.SIGCONT)
                one.send_signal(signal.SIGTERM)
        until = time.monotonic() + deadline_s
        for one in running:
            try:
                one.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.ended["(stopping)", "did not stop when asked"] += 1
            process.stop(one, deadline_s=0)


def children_of(pid: int) -> dict[int, str]:
    """The running children of a process, with their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for child in pids:
            if is_running(int(child)):
                try:
                    command = Path(f"/proc/{child}/cmdline").read_bytes()
                except OSError:
                    continue
                found[int(child)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not collected by its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
