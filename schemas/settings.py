"""Every setting of every process, declared once.

A setting comes from the environment (`METERING_<NAME>`), else from a TOML file (`METERING_SETTINGS` names it;
keys are the lower-case names below), else from its default. An empty environment variable counts as not set.
A name that is no setting, or a value that is not accepted, is a `SettingsError` of one line.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "METERING_"

FILE_VARIABLE = "METERING_SETTINGS"

RESERVED = {
    FILE_VARIABLE: "a TOML file with settings; the environment wins over it",
    "METERING_READY_FILE": "internal: a file that a process writes when it is ready, for its supervisor",
    "METERING_TEST_BROKER": "tests only: which broker the integration suite runs on",
    "METERING_FAULT": "tests only: where a process shall kill itself",
    "METERING_FAULT_ONCE": "tests only: a file; while it exists, the process does not kill itself",
}
"""Names with the prefix that are no settings, with what they are."""


class SettingsError(Exception):
    """A setting, or a file that a setting names, is wrong. One line, to be shown as it is."""


def _host_and_port(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError
    if not re.fullmatch(r"[^\s/@,]+", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError
    if not 1 <= int(port) <= 65_535:
        raise ValueError


def _kafka_servers(text: str) -> str:
    servers = [server.strip() for server in text.split(",")]
    try:
        for server in servers:
            _host_and_port(server)
    except ValueError:
        raise ValueError("must be host:port, or several separated by commas") from None
    return ",".join(servers)


def _redis_url(text: str) -> str:
    expected = ValueError("must be redis://host:port/db, rediss://host:port/db or unix:///path")
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise expected from None
    if url.scheme == "unix" and url.path not in ("", "/"):
        return text
    if url.scheme not in ("redis", "rediss") or not url.hostname or port == 0:
        raise expected
    if not re.fullmatch(r"/?|/[0-9]+", url.path):
        raise expected
    return text


def _clickhouse_url(text: str) -> str:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError("must be http://host:port or https://host:port") from None
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise ValueError("must be http://host:port or https://host:port")
    if url.username is not None or url.password is not None:
        raise ValueError(
            "must not hold a user: give METERING_CLICKHOUSE_USER and METERING_CLICKHOUSE_PASSWORD"
        )
    if url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError("must be http://host:port or https://host:port, with nothing after it")
    return text


def _accounts_database(text: str | None) -> str | None:
    if text is None:
        return None
    expected = ValueError("must be sqlite:///FILE or postgresql://user@host/database")
    try:
        url = urlsplit(text)
    except ValueError:
        raise expected from None
    if url.scheme == "sqlite" and not url.netloc and len(url.path) > 1:
        return text
    if url.scheme != "postgresql" or url.path in ("", "/"):
        raise expected
    return text


def _long_secret(secret: SecretStr) -> SecretStr:
    if 0 < len(secret.get_secret_value()) < 32:
        raise ValueError("must have at least 32 characters")
    return secret


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Count = Annotated[int, BeforeValidator(_not_boolean)]
Seconds = Annotated[float, BeforeValidator(_not_boolean), Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """All settings, valid by construction. Build it with `load_settings`, or by keywords in a test."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    kafka: Annotated[str, AfterValidator(_kafka_servers)] = Field(
        default="localhost:9092", description="Kafka's bootstrap servers: host:port, several by commas"
    )
    redis: Annotated[str, AfterValidator(_redis_url)] = Field(
        default="redis://localhost:6379/0",
        description="Redis or Valkey: redis://, rediss:// or unix://",
        repr=False,
    )
    clickhouse: Annotated[str, AfterValidator(_clickhouse_url)] = Field(
        default="http://localhost:8123", description="ClickHouse's HTTP interface: http:// or https://"
    )
    clickhouse_database: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")] = Field(
        default="lingua", description="ClickHouse database: letters, digits and _"
    )
    clickhouse_user: Annotated[str, Field(min_length=1)] = Field(
        default="default", description="ClickHouse user"
    )
    clickhouse_password: SecretStr = Field(default=SecretStr(""), description="ClickHouse password")
    rate_card: Path | None = Field(
        default=None, description="rate card, a JSON or TOML file; without it the built-in one"
    )
    state_dir: Path = Field(default=Path("var"), description="directory of the flows' recovery stores")
    broker_append_time: bool = Field(
        default=True,
        description="true: the broker stamps messages with LogAppendTime, and the flows refuse one that does "
        "not; false: it cannot (the embedded one), and the flows use their own clock",
    )
    partitions: Annotated[Count, Field(ge=1, le=10_000)] = Field(
        default=4, description="partitions of a topic that `metering migrate` makes"
    )
    idle_timeout_s: Annotated[Count, Field(ge=1, le=86_400)] = Field(
        default=300, description="seconds of silence after which a scope is settled by timeout"
    )
    presence_max_s: Annotated[Count, Field(ge=1, le=604_800)] = Field(
        default=43_200, description="seconds after the last `joined` at which a member counts as gone"
    )
    fence_lag_s: Annotated[Count, Field(ge=0, le=2_592_000)] = Field(
        default=1_800, description="seconds that the fence stands behind the flows' committed position"
    )
    fence_interval_s: Seconds = Field(default=10.0, description="seconds between two moves of the fence")
    resettle_interval_s: Seconds = Field(
        default=300.0, description="seconds between two runs of `metering resettle` by the process audit"
    )
    reconcile_interval_s: Seconds = Field(
        default=3_600.0, description="seconds between two runs of `metering reconcile` by the process audit"
    )
    emit_interval_ms: Annotated[Count, Field(ge=0, le=60_000)] = Field(
        default=200, description="milliseconds over which a scope's emissions are coalesced"
    )
    outbox_max_entries: Annotated[Count, Field(ge=1_000, le=100_000_000)] = Field(
        default=1_000_000, description="entries in the Redis stream at which settlement waits for the ledger"
    )
    outbox_retention_s: Annotated[Count, Field(ge=0, le=604_800)] = Field(
        default=3_600, description="seconds that drained entries stay in the Redis stream"
    )
    request_retention_s: Annotated[Count, Field(ge=3_600, le=31_536_000)] = Field(
        default=604_800,
        description="seconds that Redis keeps the result of a money command; its request id stays spent for ever",
    )
    write_off_interval_s: Annotated[Count, Field(ge=1, le=86_400)] = Field(
        default=1_800,
        description="seconds of a period: once in each, users below zero are paid for from their nodes' credit",
    )
    plans: Path | None = Field(
        default=None, description="file of plans, JSON or TOML: minutes that a period includes"
    )
    metrics_port: Annotated[Count, Field(ge=0, le=65_535)] = Field(
        default=0,
        description="TCP port of a process's Prometheus metrics; 0 is off. Under `metering up` the flows take "
        "this port and the next ones, in the order settlement, usage_store, ledger, audit, alerts, write_off, "
        "accounts",
    )
    epoch_interval_s: Annotated[Count, Field(ge=1, le=3_600)] = Field(
        default=10, description="seconds between two snapshots of a flow (Bytewax's epoch interval)"
    )
    usage_linger_ms: Annotated[Count, Field(ge=0, le=60_000)] = Field(
        default=500, description="milliseconds that the usage store gathers rows for one insert"
    )
    accounts_database: Annotated[str | None, AfterValidator(_accounts_database)] = Field(
        default=None,
        description="database of the accounts: sqlite:///FILE or postgresql://...; without it, SQLite in "
        "`METERING_STATE_DIR/accounts.db`",
        repr=False,
    )
    accounts_secret: Annotated[SecretStr, AfterValidator(_long_secret)] = Field(
        default=SecretStr(""),
        description="root of every key of the accounts, at least 32 characters, the same in every process and for "
        "ever; without it, the one in `METERING_STATE_DIR/accounts.secret`, made at the first use",
    )
    accounts_port: Annotated[Count, Field(ge=0, le=65_535)] = Field(
        default=0,
        description="TCP port of the accounts API under `metering up`, on the loopback; 0 is any free one",
    )
    accounts_pool_size: Annotated[Count, Field(ge=1, le=1_000)] = Field(
        default=10,
        description="connections that a process keeps to the accounts database; as many again at peaks",
    )
    accounts_access_token_s: Annotated[Count, Field(ge=30, le=86_400)] = Field(
        default=600, description="seconds that an access token lives"
    )
    accounts_refresh_token_s: Annotated[Count, Field(ge=60, le=31_536_000)] = Field(
        default=2_592_000, description="seconds after its last refresh at which a log-in is over"
    )
    accounts_argon2_time_cost: Annotated[Count, Field(ge=1, le=100)] = Field(
        default=3, description="passes of argon2id over its memory; hashes are made anew when it changes"
    )
    accounts_argon2_memory_kib: Annotated[Count, Field(ge=32, le=4_194_304)] = Field(
        default=65_536, description="memory of one argon2id hash in KiB"
    )
    accounts_command_wait_ms: Annotated[Count, Field(ge=0, le=60_000)] = Field(
        default=5_000, description="milliseconds that a top-up waits for its result before it answers 202"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then the environment: no `.env` file is picked up from wherever a process was started."""
        return init_settings, env_settings


def load_settings(file: Path | None = None) -> Settings:
    """The settings of this process: the environment, over `file` (or the one that METERING_SETTINGS names).

    Raises SettingsError, one line, for an unknown name, a value that is not accepted, or an unreadable file.
    """
    environment = {
        name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)
    }
    _refuse_unknown(environment)
    if file is None and environment.get(FILE_VARIABLE):
        file = Path(environment[FILE_VARIABLE])
    from_file = {} if file is None else _read_file(file)
    from_file = {key: value for key, value in from_file.items() if not environment.get(PREFIX + key.upper())}
    try:
        return Settings(**from_file)
    except ValidationError as error:
        raise SettingsError(
            _explain(error.errors(include_url=False)[0], from_file, environment, file)
        ) from None


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    for name in sorted(environment):
        if name not in RESERVED and name.removeprefix(PREFIX).lower() not in Settings.model_fields:
            raise SettingsError(
                f"{name} is not a setting{_suggestion(name.removeprefix(PREFIX).lower(), PREFIX)}"
            )


def _suggestion(field: str, prefix: str) -> str:
    close = difflib.get_close_matches(field, Settings.model_fields, n=1)
    if not close:
        return " (docs/settings.md lists them)"
    return f": did you mean {prefix + close[0].upper() if prefix else close[0]}?"


def _read_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"settings file {file}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"settings file {file}: not TOML: {one_line(str(error))}") from None
    for key in table:
        if key not in Settings.model_fields:
            raise SettingsError(f"settings file {file}: {key!r} is not a setting{_suggestion(key, '')}")
    return table


def _explain(
    error: ErrorDetails, from_file: Mapping[str, Any], environment: Mapping[str, str], file: Path | None
) -> str:
    field = str(error["loc"][0])
    name = PREFIX + field.upper()
    value = from_file.get(field, environment.get(name))
    origin = f" ({field} in {file})" if field in from_file else ""
    return f"{name}={_shown(field, value)}{origin}: {explain_value_error(error)}"


def _shown(field: str, value: object) -> str:
    """The value without its secrets, and not longer than a line allows."""
    if field.endswith(("password", "secret")):
        return "***"
    text = one_line(str(value))
    text = re.sub(r"://.*@", "://***@", text)
    text = re.sub(r"(?i)(password=)[^&]*", r"\1***", text)
    return repr(text[:97] + "..." if len(text) > 100 else text)


def one_line(text: str) -> str:
    """The text with every run of white space, line ends included, as one space."""
    return " ".join(text.split())


def explain_value_error(error: ErrorDetails) -> str:
    """What pydantic found wrong with a value, in the words of this project: "must be ..."."""
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|Value) should (be|have|match)", r"must \2", message)
    return one_line(message)
