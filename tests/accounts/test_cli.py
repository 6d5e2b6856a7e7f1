"""`metering accounts ...` as an operator runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.accounts.support import PASSWORD
from tests.support.commands import clean_environment, metering, one_line

CHEAP = {"accounts_argon2_time_cost": "1", "accounts_argon2_memory_kib": "32"}
STDIN = PASSWORD.encode() + b"\n"


def test_from_an_empty_directory_to_another_database(
    tmp_path: Path, make_url_of: Callable[[str, str], str]
) -> None:
    """Migrate, make an operator, rotate the key, back up; restore into PostgreSQL; each says what it did in
    one line.
    """
    here = clean_environment(state_dir=str(tmp_path / "state"), **CHEAP)
    unready = metering("accounts", "serve", "--port", "0", environment=here)
    assert unready.returncode == 1
    assert "run `metering accounts migrate`" in one_line(unready.stderr)

    assert one_line(metering("accounts", "migrate", environment=here).stderr).endswith("revision 0003")
    made = metering(
        "accounts",
        "create-operator",
        "root",
        "root@example.com",
        "--password-stdin",
        environment=here,
        stdin=STDIN,
    )
    user_id = one_line(made.stdout)
    again = metering(
        "accounts",
        "create-operator",
        "root",
        "ROOT@example.com",
        "--password-stdin",
        environment=here,
        stdin=STDIN,
    )
    assert one_line(again.stdout) == user_id
    assert "stays what it was" in one_line(again.stderr)
    rotated = metering("accounts", "rotate-key", environment=here)
    assert len(one_line(rotated.stdout)) == 16

    file = tmp_path / "a.backup"
    backed = metering("backup", str(file), environment=here)
    assert "users 1" in one_line(backed.stderr)
    secret = (tmp_path / "state" / "accounts.secret").read_text().strip()
    assert secret not in file.read_text()

    there = clean_environment(
        state_dir=str(tmp_path / "other"), accounts_database=make_url_of("postgresql", "empty"), **CHEAP
    )
    lost = metering("restore", str(file), environment=there)
    assert lost.returncode == 1
    assert "accounts.secret" in one_line(lost.stderr)
    there["METERING_ACCOUNTS_SECRET"] = secret
    restored = metering("restore", str(file), environment=there)
    assert (restored.returncode, "restored" in one_line(restored.stderr)) == (0, True)
    full = metering("accounts", "restore", str(file), environment=there)
    assert (full.returncode, "not empty" in one_line(full.stderr)) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("root", "no address"), STDIN, "body.email"),
        (("x", "root@example.com"), STDIN, "username"),
        (("root", "root@example.com"), b"short\n", "password"),
        (("root", "root@example.com"), b"aaaaaaaaaaaa\n", "4 different"),
    ],
)
def test_a_wrong_operator_is_one_line(
    tmp_path: Path, arguments: tuple[str, str], stdin: bytes, said: str
) -> None:
    """With exit code 2, and without the password."""
    here = clean_environment(state_dir=str(tmp_path), **CHEAP)
    metering("accounts", "migrate", environment=here)
    done = metering(
        "accounts", "create-operator", *arguments, "--password-stdin", environment=here, stdin=stdin
    )
    line = one_line(done.stderr)
    assert (done.returncode, said.removeprefix("body.") in line) == (2, True), line
    assert stdin.decode().strip() not in line


def test_a_database_that_is_away_is_one_line(tmp_path: Path) -> None:
    """For each command that needs it."""
    away = clean_environment(
        state_dir=str(tmp_path), accounts_database="postgresql://u:hush@127.0.0.1:1/accounts", **CHEAP
    )
    for command in (("accounts", "migrate"), ("accounts", "rotate-key"), ("backup", str(tmp_path / "x"))):
        done = metering(*command, environment=away)
        line = one_line(done.stderr)
        assert done.returncode == 1 and line.startswith("metering: "), line
        assert "hush" not in line
    assert not (tmp_path / "x").exists()


def test_back_and_forth(tmp_path: Path) -> None:
    """Down to a revision that exists, and up again."""
    here = clean_environment(state_dir=str(tmp_path), **CHEAP)
    metering("accounts", "migrate", environment=here)
    assert metering("accounts", "migrate", "--down-to", "0007", environment=here).returncode == 2
    down = metering("accounts", "migrate", "--down-to", "base", environment=here)
    assert one_line(down.stderr).endswith("revision none")
    assert one_line(metering("accounts", "migrate", environment=here).stderr).endswith("revision 0003")
