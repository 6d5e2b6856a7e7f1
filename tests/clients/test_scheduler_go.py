"""Admission in Go, with plain Redis commands and the same script: the same answers as the Python client's.

The program is built with the Go on PATH, and go-redis from the Go proxy; the builds are kept where Go keeps them.
Where there is no Go, or its modules cannot be had, the tests are skipped and say so.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from clients.scheduler import Hold, Reason, Scheduler
from schemas import redis_keys
from tests.support.admission import client as text_client
from tests.support.admission import holds, running_valkey, set_balance

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "clients" / "go"
SCRIPT = ROOT / "clients" / "scheduler" / "lua" / "holds.lua"
BUILD_TIMEOUT_S = 1_200
"""Go's own library is compiled once for a machine."""


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program. A missing toolchain or module skips; a program that does not compile fails."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.skip("Go is not installed: the Go program of docs/contracts.md was not run")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    built = tmp_path_factory.mktemp("go") / "admission"
    got = _go([go, "mod", "download"], environment)
    if got.returncode:
        last = (got.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"Go's modules cannot be had, the Go program of docs/contracts.md was not run: {last}")
    done = _go([go, "build", "-o", str(built), "."], environment)
    assert done.returncode == 0, done.stderr
    return built


def _go(argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=SOURCE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )


class GoClient:
    """The running program."""

    def __init__(self, program: Path, url: str) -> None:
        address = url.removeprefix("redis://").removesuffix("/0")
        argv = [str(program), address, str(SCRIPT)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *asked: object) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(each) for each in asked]) + "\n")
        self._process.stdin.flush()
        answer: list[str] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def in_go(program: Path, valkey_url: str) -> Iterator[GoClient]:
    """The program on the tests' server."""
    client = GoClient(program, valkey_url)
    yield client
    client.close()


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[tuple[str, redis.Redis]]:
    """A second server, for the Python client's answers to the same questions."""
    with running_valkey(tmp_path / "other") as url, text_client(url) as client:
        client.set(redis_keys.EPOCH, 1)
        yield url, client


def test_both_say_the_same(
    in_go: GoClient, server: redis.Redis, other_server: tuple[str, redis.Redis]
) -> None:
    """Four hundred questions in the same order, each client on a server of its own: the same answers and holds."""
    url, other = other_server
    chance = random.Random(5)
    users, sessions = ["u-1", "u-2"], [f"s-{number}" for number in range(6)]
    seen: set[str] = set()
    with Scheduler(url, deadline_s=60, attempt_s=60) as scheduler:
        for _ in range(400):
            user, session = chance.choice(users), chance.choice(sessions)
            what = chance.randrange(6)
            if what == 0:
                balance_us, floor_us = chance.choice([(30, 0), (0, 0), (10**17, 10**17 - 25), (-5, -40)])
                set_balance(server, user, balance_us, floor_us)
                set_balance(other, user, balance_us, floor_us)
            elif what == 1:
                released = scheduler.release(user, session).reason is Reason.OK
                assert in_go.ask("release", user, session) == [str(released).lower()]
            else:
                amount_us = chance.choice([0, 1, 10, 10**12])
                said = scheduler.admit(user, session, Hold(amount_us, 3_600_000))
                answer = in_go.ask("admit", user, session, amount_us, 3_600_000)
                assert answer[:4] == [
                    said.reason,
                    str(said.balance_us),
                    str(said.held_us),
                    str(said.floor_us),
                ]
                assert (int(answer[4]) > 0) is said.admitted
                seen.add(said.reason)
            assert holds(server, user) == holds(other, user)
    assert seen == {"OK", "AT_FLOOR"}


def test_both_work_on_the_same_holds(in_go: GoClient, server: redis.Redis, valkey_url: str) -> None:
    """What one has placed the other sees, renews and releases."""
    set_balance(server, "u-1", 15, 0)
    with Scheduler(valkey_url, deadline_s=60, attempt_s=60) as scheduler:
        assert in_go.ask("admit", "u-1", "s-go", 10, 60_000)[0] == "OK"
        assert scheduler.admit("u-1", "s-py", Hold(10, 60_000)).held_us == 20
        assert in_go.ask("admit", "u-1", "s-go-2", 10, 60_000)[0] == "AT_FLOOR"
        assert scheduler.release("u-1", "s-go").reason is Reason.OK
        assert in_go.ask("release", "u-1", "s-py") == ["true"]
        assert in_go.ask("release", "u-1", "s-py") == ["false"]
    assert holds(server, "u-1") == {}


def test_an_empty_and_a_rolled_back_redis_and_wrong_arguments(in_go: GoClient, server: redis.Redis) -> None:
    """Not ready is an answer, a wrong argument an error."""
    server.set(redis_keys.ENTRIES, 7)
    assert in_go.ask("admit", "u-1", "s-1", 10, 60_000)[0] == "OK"
    server.set(redis_keys.ENTRIES, 6)
    assert in_go.ask("admit", "u-1", "s-2", 10, 60_000)[0] == "NOT_READY"
    server.delete(redis_keys.EPOCH)
    assert in_go.ask("admit", "u-1", "s-2", 10, 60_000)[0] == "NOT_READY"
    [error, text] = in_go.ask("admit", "u-1", "s-2", -10, 60_000)
    assert (error, "ARGUMENT amount" in text) == ("ERROR", True)


def test_the_page_shows_the_program_that_was_run() -> None:
    """docs/contracts.md has the marked part of it, letter by letter."""
    shown = (
        (SOURCE / "main.go").read_text(encoding="utf-8").split("// docs: begin\n")[1].split("// docs: end")[0]
    )
    page = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
    assert f"```go\n{shown.strip()}\n```" in page
