"""Settings: where they come from, and the line that a wrong one gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas.settings import RESERVED, Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("METERING_"):
            monkeypatch.delenv(name)


def refusal(file: Path | None = None) -> str:
    """The one line about wrong settings."""
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_defaults() -> None:
    """Without anything the settings are those of the documentation."""
    settings = load_settings()
    assert (settings.kafka, settings.redis) == ("localhost:9092", "redis://localhost:6379/0")
    assert settings.clickhouse_password.get_secret_value() == ""
    assert settings.rate_card is None


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file sets what the environment does not, and an empty variable counts as not set."""
    file = tmp_path / "settings.toml"
    file.write_text('kafka = "file:1"\npartitions = 7\nepoch_interval_s = 2\nidle_timeout_s = 9\n')
    monkeypatch.setenv("METERING_KAFKA", "a:1, b:2,[::1]:3")
    monkeypatch.setenv("METERING_IDLE_TIMEOUT_S", "")
    monkeypatch.setenv("METERING_CLICKHOUSE_PASSWORD", "hush")
    monkeypatch.setenv("METERING_BROKER_APPEND_TIME", "false")
    settings = load_settings(file)
    assert settings.kafka == "a:1,b:2,[::1]:3"
    assert (settings.partitions, settings.epoch_interval_s, settings.idle_timeout_s) == (7, 2, 9)
    assert settings.broker_append_time is False
    assert settings.clickhouse_password.get_secret_value() == "hush"
    assert "hush" not in repr(settings)


def test_a_bad_value_in_the_file_does_not_matter_when_the_environment_has_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the value that counts is checked."""
    file = tmp_path / "settings.toml"
    file.write_text("partitions = 0\n")
    monkeypatch.setenv("METERING_PARTITIONS", "3")
    assert load_settings(file).partitions == 3


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """METERING_SETTINGS names it, unless an argument does."""
    file = tmp_path / "settings.toml"
    file.write_text("partitions = 5\n")
    monkeypatch.setenv("METERING_SETTINGS", str(file))
    assert load_settings().partitions == 5
    other = tmp_path / "other.toml"
    other.write_text("partitions = 6\n")
    assert load_settings(other).partitions == 6


@pytest.mark.parametrize("name", sorted(set(RESERVED) - {"METERING_SETTINGS"}))
def test_reserved_names_are_tolerated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with the prefix that other parts use are no unknown settings."""
    monkeypatch.setenv(name, "anything")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("METERING_KAFA", "x:1", "METERING_KAFA is not a setting: did you mean METERING_KAFKA?"),
        ("METERING_XYZZY", "1", "METERING_XYZZY is not a setting (docs/settings.md lists them)"),
        (
            "METERING_KAFKA",
            "broker",
            "METERING_KAFKA='broker': must be host:port, or several separated by commas",
        ),
        ("METERING_KAFKA", "a:1,,b:2", "METERING_KAFKA='a:1,,b:2': must be host:port"),
        ("METERING_KAFKA", "a:0", "METERING_KAFKA='a:0': must be host:port"),
        ("METERING_KAFKA", "a:65536", "METERING_KAFKA='a:65536': must be host:port"),
        ("METERING_KAFKA", "kafka://a:1", "METERING_KAFKA='kafka://a:1': must be host:port"),
        ("METERING_KAFKA", "::1:9092", "METERING_KAFKA='::1:9092': must be host:port"),
        (
            "METERING_REDIS",
            "http://h:1",
            "METERING_REDIS='http://h:1': must be redis://host:port/db, rediss://",
        ),
        ("METERING_REDIS", "redis://h:1/x", "METERING_REDIS='redis://h:1/x': must be redis://host:port/db"),
        ("METERING_REDIS", "redis://h:x/0", "METERING_REDIS='redis://h:x/0': must be redis://host:port/db"),
        ("METERING_REDIS", "unix://", "METERING_REDIS='unix://': must be redis://host:port/db"),
        (
            "METERING_REDIS",
            "tcp://u:s3cret@h:1",
            "METERING_REDIS='tcp://***@h:1': must be redis://host:port/db",
        ),
        (
            "METERING_REDIS",
            "tcp://h?password=s3cret",
            "METERING_REDIS='tcp://h?password=***': must be redis://",
        ),
        (
            "METERING_CLICKHOUSE",
            "h:8123",
            "METERING_CLICKHOUSE='h:8123': must be http://host:port or https://",
        ),
        (
            "METERING_CLICKHOUSE",
            "http://h:1/x?y",
            "METERING_CLICKHOUSE='http://h:1/x?y': must be http://host:port",
        ),
        (
            "METERING_CLICKHOUSE",
            "http://u:s3cret@h:1",
            "METERING_CLICKHOUSE='http://***@h:1': must not hold a user",
        ),
        ("METERING_CLICKHOUSE_DATABASE", "a;b", "METERING_CLICKHOUSE_DATABASE='a;b': must match pattern"),
        ("METERING_PARTITIONS", "four", "METERING_PARTITIONS='four': must be a valid integer"),
        ("METERING_PARTITIONS", "0", "METERING_PARTITIONS='0': must be greater than or equal to 1"),
        ("METERING_PARTITIONS", "1.5", "METERING_PARTITIONS='1.5': must be a valid integer"),
        (
            "METERING_METRICS_PORT",
            "65536",
            "METERING_METRICS_PORT='65536': must be less than or equal to 65535",
        ),
        (
            "METERING_EPOCH_INTERVAL_S",
            "0",
            "METERING_EPOCH_INTERVAL_S='0': must be greater than or equal to 1",
        ),
        ("METERING_EPOCH_INTERVAL_S", "nan", "METERING_EPOCH_INTERVAL_S='nan': must be"),
        ("METERING_EPOCH_INTERVAL_S", "inf", "METERING_EPOCH_INTERVAL_S='inf': must be"),
        (
            "METERING_BROKER_APPEND_TIME",
            "maybe",
            "METERING_BROKER_APPEND_TIME='maybe': must be a valid boolean",
        ),
        (
            "METERING_ACCOUNTS_DATABASE",
            "mysql://u:s3cret@h/d",
            "METERING_ACCOUNTS_DATABASE='mysql://***@h/d': must be",
        ),
        (
            "METERING_ACCOUNTS_DATABASE",
            "sqlite://",
            "METERING_ACCOUNTS_DATABASE='sqlite://': must be sqlite:///FILE",
        ),
        (
            "METERING_ACCOUNTS_DATABASE",
            "postgresql://h",
            "METERING_ACCOUNTS_DATABASE='postgresql://h': must be",
        ),
        (
            "METERING_ACCOUNTS_SECRET",
            "s3cret",
            "METERING_ACCOUNTS_SECRET=***: must have at least 32 characters",
        ),
        ("METERING_SETTINGS", "/missing.toml", "settings file /missing.toml: No such file or directory"),
    ],
)
def test_a_wrong_variable_is_one_clear_line(
    name: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the variable, its value without secrets, and what is accepted."""
    monkeypatch.setenv(name, value)
    said = refusal()
    assert said.startswith(line)
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("partitions = true", "METERING_PARTITIONS='True' (partitions in {file}): must be a number"),
        ("partitions = '4x'", "METERING_PARTITIONS='4x' (partitions in {file}): must be a valid integer"),
        ("kafka = 7", "METERING_KAFKA='7' (kafka in {file}): must be a valid string"),
        ("kafka = ['a:1']", "METERING_KAFKA="),
        (
            "clickhouse_password = 7",
            "METERING_CLICKHOUSE_PASSWORD=*** (clickhouse_password in {file}): must be",
        ),
        ("partition = 4", "settings file {file}: 'partition' is not a setting: did you mean partitions?"),
        ("[metering]\nkafka = 'a:1'", "settings file {file}: 'metering' is not a setting"),
        ("METERING_KAFKA = 'a:1'", "settings file {file}: 'METERING_KAFKA' is not a setting"),
        ("kafka = ", "settings file {file}: not TOML: "),
    ],
)
def test_a_wrong_file_is_one_clear_line(content: str, line: str, tmp_path: Path) -> None:
    """The line names the setting and the file."""
    file = tmp_path / "settings.toml"
    file.write_text(content)
    assert refusal(file).startswith(line.format(file=file))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    """A directory, and bytes that are not UTF-8."""
    assert refusal(tmp_path) == f"settings file {tmp_path}: Is a directory"
    file = tmp_path / "settings.toml"
    file.write_bytes(b"\xff")
    assert refusal(file) == f"settings file {file}: not UTF-8 text"


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:1/3",
        "rediss://u:p@h:1",
        "redis://:p@[::1]:6379/0",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_urls_of_redis(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP, TLS and a socket, with and without user, port and database; a password is not shown."""
    monkeypatch.setenv("METERING_REDIS", url)
    settings = load_settings()
    assert settings.redis == url
    assert ":p@" not in repr(settings)
