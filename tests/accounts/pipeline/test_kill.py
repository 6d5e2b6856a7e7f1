"""The API as a process of its own, killed with SIGKILL between two effects of a money request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.embedded.process import free_port
from telemetry import faults
from tests.accounts.support import PASSWORD, SECRET
from tests.support.commands import clean_environment, metering
from tests.support.processes import wait_until
from tests.support.world import World


def environment(world: World, database_url: str, state: Path, **more: str) -> dict[str, str]:
    return clean_environment(
        **world.addresses,
        accounts_database=database_url,
        accounts_secret=SECRET,
        accounts_argon2_time_cost="1",
        accounts_argon2_memory_kib="32",
        accounts_command_wait_ms="30000",
        state_dir=str(state),
        **more,
    )


@contextmanager
def serving(variables: dict[str, str], log: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """`metering accounts serve` until the end of the block."""
    port = free_port()
    ready = log.with_name(f"ready-{uuid.uuid4().hex}")
    command = [sys.executable, "-m", "app", "accounts", "serve", "--migrate", "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=variables | {"METERING_READY_FILE": str(ready)}, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, "the API serves", 120)
        assert process.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("point", [faults.ACCOUNTS_REQUEST_NOTED, faults.ACCOUNTS_COMMAND_SENT])
def test_killed_between_two_effects_the_repeat_moves_once(
    world: World, database_url: str, tmp_path: Path, point: str
) -> None:
    """The caller has no answer, repeats the same request on a new process, and it was carried out once."""
    variables = environment(world, database_url, tmp_path, fault=point, fault_once=str(tmp_path / "killed"))
    made = metering("accounts", "migrate", environment=variables)
    assert made.returncode == 0, made.stderr.decode()
    operator = metering(
        "accounts",
        "create-operator",
        "root",
        "root@example.com",
        "--password-stdin",
        environment=variables,
        stdin=PASSWORD.encode() + b"\n",
    )
    assert operator.returncode == 0, operator.stderr.decode()
    account = f"user/{operator.stdout.decode().strip()}"
    request = str(uuid.uuid4())

    def top_up(client: httpx.Client) -> httpx.Response:
        login = client.post("/v1/login", json={"login": "root", "password": PASSWORD}).json()
        headers = {"Authorization": f"Bearer {login['access_token']}", "Idempotency-Key": request}
        return client.post(f"/v1/accounts/{account}/top-ups", json={"minutes": "5"}, headers=headers)

    with serving(variables, tmp_path / "api.log") as (client, process):
        with pytest.raises(httpx.TransportError):
            top_up(client)
        assert process.wait(30) == -signal.SIGKILL
    with serving(variables, tmp_path / "api.log") as (client, process):
        done = top_up(client)
        assert (done.status_code, done.json()["balance"]) == (200, "5"), done.text
        assert top_up(client).json() == done.json()
        login = client.post("/v1/login", json={"login": "root", "password": PASSWORD}).json()
        headers = {"Authorization": f"Bearer {login['access_token']}"}
        assert client.get("/v1/me/balance", headers=headers).json()["balance"] == "5"
        entries = client.get("/v1/audit", params={"action": "top_up.requested"}, headers=headers).json()[
            "items"
        ]
        assert [entry["request_id"] for entry in entries] == [request]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
