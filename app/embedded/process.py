"""Child processes that cannot outlive their parent, and the ports they listen on.

A child dies with its parent even when the parent is SIGKILLed: the kernel sends it SIGKILL (Linux
`PR_SET_PDEATHSIG`; elsewhere only an orderly end stops the children). The kernel means the *thread* that
spawned it, so spawn from the main thread. Each child leads its own session: a Ctrl-C at the terminal reaches
the parent alone, which then stops its children in order.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import CommandError

LOOPBACK = "127.0.0.1"

_PORTS = range(20_000, 32_000)
"""Below the range from which the kernel takes the ports of outgoing connections: one of those could hold a
remembered port at the next start, and a health check could even connect to itself."""

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


class ServiceError(CommandError):
    """A server cannot start; one line says which and why."""


@dataclass(frozen=True)
class Service:
    """A server as a child process: how to run it, how to tell that it answers, how to stop it."""

    name: str
    argv: tuple[str, ...]
    port: int
    """TCP, on loopback."""
    healthy: Callable[[], bool]
    """One round trip of the server's own protocol; blocks for at most about 2 s, never raises."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_deadline_s: float = 10.0
    start_deadline_s: float = 30.0


def package(name: str) -> Any:
    """A package that only the embedded servers need. Raises ServiceError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ServiceError(
            f"the package {name} is missing: install this one with its servers, lingua-metering[embedded]"
        ) from None


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        # As servers do it: a connection of the last run that lingers in TIME_WAIT does not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as problem:
            if problem.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
        return True


def free_port(besides: frozenset[int] = frozenset()) -> int:
    """A loopback port that nobody listens on, and none of `besides`. Raises ServiceError if there is none."""
    for port in random.sample(_PORTS, k=200):
        if port not in besides and port_is_free(port):
            return port
    raise ServiceError(f"no free TCP port found between {_PORTS.start} and {_PORTS.stop - 1}")


def spawn(
    argv: tuple[str, ...], environment: Mapping[str, str], log: Path, keep_open: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a child that ends with this process, its output appended to `log`. Raises ServiceError.

    `environment` comes on top of this process's own; the child inherits the descriptors in `keep_open`.
    """
    parent = os.getpid()

    def tie_to_parent() -> None:
        # Between fork and exec: nothing here may import, lock or log.
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                # The parent died before the request was made, so the kernel will never send the signal.
                os._exit(1)

    with log.open("ab") as output:
        try:
            return subprocess.Popen(
                argv,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=keep_open,
                preexec_fn=tie_to_parent,  # noqa: PLW1509 - prctl must run in the child; see above
            )
        except OSError as problem:
            raise ServiceError(f"cannot run {argv[0]}: {problem.strerror}") from None


def start(service: Service, log: Path) -> subprocess.Popen[bytes]:
    """Start the server and wait until it answers. Raises ServiceError when it ends, or is silent too long."""
    process = spawn(service.argv, service.environment, log)
    deadline = time.monotonic() + service.start_deadline_s
    while not service.healthy():
        if process.poll() is not None:
            raise ServiceError(f"{service.name} ended at its start ({outcome(process)}){last_line(log)}")
        if time.monotonic() > deadline:
            stop(process, deadline_s=0)
            raise ServiceError(
                f"{service.name} did not answer within {service.start_deadline_s:g} s; see {log}"
            )
        time.sleep(0.02)
    return process


def stop(process: subprocess.Popen[bytes], deadline_s: float, first: signal.Signals = signal.SIGTERM) -> None:
    """End the child and whatever it started itself: ask with `first`, after `deadline_s` send SIGKILL."""
    if process.poll() is None and deadline_s > 0:
        process.send_signal(first)
        with suppress(subprocess.TimeoutExpired):
            process.wait(deadline_s)
    with suppress(ProcessLookupError):
        # The child leads its own group, and a group outlives its leader.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(process: subprocess.Popen[bytes]) -> str:
    """How an ended child ended, in words."""
    code = process.returncode
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def last_line(log: Path) -> str:
    """`: <the last line that says something>`, or an empty string."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    spoken = [line for line in lines if line]
    return f": {spoken[-1][:300]}" if spoken else ""


def accepts_connections(port: int) -> bool:
    """Whether something listens on the loopback port: the cheap question before a real round trip."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True
