"""docker-compose.yml and what it mounts: pinned, health-checked, on loopback, with settings that load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import app.dataflows
from app.adopt_log import recovery_store
from app.cli import app as command_line
from app.embedded.apache_kafka import VERSION as TESTED_KAFKA
from app.errors import CommandError
from app.migrate import OLDEST_CLICKHOUSE
from app.run_flow import flow_command
from app.supervisor import default_flows
from schemas.settings import PREFIX, Settings, load_settings
from tests.support.dashboards import (
    CLICKHOUSE_UID,
    DASHBOARDS,
    NAMES,
    PROMETHEUS_UID,
    ROOT,
    panel_queries,
    read_dashboard,
    read_yaml,
)

COMPOSE: dict[str, Any] = read_yaml(ROOT / "docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWN = {name: service for name, service in SERVICES.items() if "build" in service}
FLOWS = {
    service["command"][0]: service
    for service in OWN.values()
    if service.get("entrypoint") == ["python", "-m", "app.run_flow"]
}
LONG_RUNNING = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}


def substituted(text: object) -> str:
    """A value as `docker compose` gives it when nothing is set: `${NAME:-default}` is the default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(text))


def provisioned(name: str) -> Any:
    """A provisioning file of Grafana."""
    return read_yaml(DASHBOARDS / "grafana/provisioning" / name / f"{name}.yml")


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned(name: str) -> None:
    """Each image names its exact version: what was tried today is what runs tomorrow."""
    _, _, tag = SERVICES[name]["image"].partition(":")
    numbers = 2 if name == "postgres" else 3
    assert re.match(r"v?\d+" + r"\.\d+" * (numbers - 1), tag), SERVICES[name]["image"]


def test_the_flows_images_are_built_on_a_pinned_one() -> None:
    """Every stage of the Dockerfile starts from the same exact version of a Python that Bytewax has."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [image] = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE))
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", image)


def test_the_flows_image_holds_the_whole_program_and_nothing_unchecked() -> None:
    """Every package is copied, let through by .dockerignore, and run by a user without rights."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = set(re.findall(r"^COPY (\w+) \./\1$", dockerfile, re.MULTILINE))
    development = {"tests", "bench", "chaos", "simulation"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - development
    assert copied == packages
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{package}" for package in packages} | {"*", "!requirements.lock"} <= set(let_through)
    assert "--require-hashes -r requirements.lock" in dockerfile
    assert re.search(r"^USER (?!root)\w+$", dockerfile, re.MULTILINE)


def test_the_servers_are_those_that_the_program_is_tested_on() -> None:
    """Kafka is the one of `make test-kafka`; ClickHouse is new enough for the views."""
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{TESTED_KAFKA}"
    version = SERVICES["clickhouse"]["image"].partition(":")[2].split(".")
    assert [int(part) for part in version[:2]] >= [int(part) for part in OLDEST_CLICKHOUSE.split(".")]
    assert version[0] == "26"


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_what_goes_on_is_watched_and_restarted(name: str) -> None:
    """Each service that is to stay has a health check with all its times, and comes back by itself."""
    check = LONG_RUNNING[name]["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)
    assert LONG_RUNNING[name]["restart"] == "unless-stopped"


def test_only_what_ends_by_itself_is_not_restarted() -> None:
    """Preparation and the command line run once."""
    assert set(SERVICES) - set(LONG_RUNNING) == {"migrate", "cli"}


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback_only(name: str) -> None:
    """Nothing is reachable from another machine."""
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    """Each dependency is waited for: until healthy, or until done where it ends by itself."""
    for other, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_healthy" if other in LONG_RUNNING else "service_completed_successfully"
        assert how["condition"] == expected


@pytest.mark.parametrize("name", SERVICES)
def test_data_lies_in_named_volumes(name: str) -> None:
    """Each mount is a declared volume, or a file of this repository, which nobody in there may write."""
    for mount in SERVICES[name].get("volumes", []):
        source, _, rest = mount.partition(":")
        if source.startswith("./"):
            assert (ROOT / source).exists()
            assert rest.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", OWN)
def test_settings_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each METERING_ name is a setting, and together they load."""
    environment = {key: substituted(value) for key, value in OWN[name]["environment"].items()}
    assert {key.removeprefix(PREFIX).lower() for key in environment} <= set(Settings.model_fields)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = load_settings()
    # The addresses are those of other services here.
    for address in (settings.kafka, settings.redis, settings.clickhouse):
        assert re.sub(r"^\w+://|:\d+.*$", "", address) in SERVICES


def test_every_flow_is_a_service() -> None:
    """The flows of `metering up` are those of the containers, and each has its factory."""
    assert set(FLOWS) == {flow.name for flow in default_flows(Settings())}
    factories = {flow.name for flow in default_flows(Settings()) if "bytewax.run" in flow.argv}
    assert factories == set(FLOWS) - {"audit"}
    assert all(callable(getattr(app.dataflows, name)) for name in factories)


def test_a_flow_is_started_as_metering_up_does(tmp_path: Path) -> None:
    """The command names the factory; a recovery store is made once, where `adopt-log` looks for it."""
    settings = Settings(state_dir=tmp_path)
    command = flow_command("settlement", settings)
    assert "app.dataflows:settlement()" in command
    assert command[-2:] == ["-r", str(recovery_store(settings, "settlement"))]
    [part] = Path(command[-1]).glob("part-*.sqlite3")
    made_at_ns = part.stat().st_mtime_ns
    assert flow_command("settlement", settings) == command
    assert part.stat().st_mtime_ns == made_at_ns
    assert "-r" not in flow_command("ledger", settings)


def test_a_flow_that_is_none_is_refused(tmp_path: Path) -> None:
    """A wrong name is one line that names the right ones, and leaves nothing behind."""
    with pytest.raises(
        CommandError, match="no flow 'bill': choose settlement, usage_store, ledger, audit, alerts"
    ):
        flow_command("bill", Settings(state_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """A file in the place of the directory is one line that names the setting."""
    (tmp_path / "recovery").write_text("")
    with pytest.raises(CommandError, match=r"METERING_STATE_DIR=.*: Not a directory"):
        flow_command("settlement", Settings(state_dir=tmp_path))


def test_the_other_commands_exist() -> None:
    """What `migrate` runs is a command of the program."""
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert "migrate" in {
        command.callback.__name__ for command in command_line.registered_commands if command.callback
    }


def test_flows_share_their_state_directory() -> None:
    """`adopt-log` moves the recovery stores of all flows, so it must see all of them."""
    directories = {service["environment"]["METERING_STATE_DIR"] for service in OWN.values()}
    assert len(directories) == 1
    for service in OWN.values():
        assert [mount.partition(":")[2] for mount in service["volumes"]] == [*directories]


def test_redis_loses_and_evicts_nothing() -> None:
    """Every answered change is on the disk, and memory pressure refuses writes, it never drops balances."""
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--maxmemory-policy"] == "noeviction"


def test_topics_never_come_by_accident() -> None:
    """A topic that Kafka made by itself would not stamp messages with LogAppendTime."""
    assert SERVICES["kafka"]["environment"]["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_prometheus_asks_every_flow() -> None:
    """Each flow is a job under its own name, on the port where its service serves metrics."""
    config = read_yaml(DASHBOARDS / "prometheus/prometheus.yml")
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    service_names = {
        service["command"][0]: name for name, service in SERVICES.items() if service in FLOWS.values()
    }
    assert targets.pop("accounts") == [f"accounts:{SERVICES['accounts']['command'][-1]}"]
    assert targets == {
        flow: [f"{service_names[flow]}:{service['environment']['METERING_METRICS_PORT']}"]
        for flow, service in FLOWS.items()
    }
    assert all((DASHBOARDS / "prometheus" / file).exists() for file in config["rule_files"])


def test_grafana_is_given_what_the_dashboards_use() -> None:
    """Data sources have the uids that panels name, and dashboards lie where the provider looks."""
    sources = {source["uid"]: source for source in provisioned("datasources")["datasources"]}
    assert set(sources) == {CLICKHOUSE_UID, PROMETHEUS_UID}
    for uid, source in sources.items():
        for query in panel_queries(uid):
            assert query.panel["datasource"] == {"type": source["type"], "uid": uid}
    grafana = SERVICES["grafana"]
    [provider] = provisioned("dashboards")["providers"]
    assert f"./dashboards/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert {path.stem for path in (DASHBOARDS / "grafana/dashboards").iterdir()} == set(NAMES)
    assert all(read_dashboard(name)["uid"] for name in NAMES)
    plugin = grafana["environment"]["GF_PLUGINS_PREINSTALL_SYNC"]
    assert re.fullmatch(rf"{sources[CLICKHOUSE_UID]['type']}@\d+\.\d+\.\d+", plugin)


def test_dashboards_read_with_a_user_who_can_only_read() -> None:
    """The data source's user exists in ClickHouse, read-only, for the flows' database alone."""
    [source] = [
        source for source in provisioned("datasources")["datasources"] if source["uid"] == CLICKHOUSE_UID
    ]
    root = ElementTree.parse(DASHBOARDS / "clickhouse/dashboards_user.xml").getroot()
    user = root.find(f"users/{source['jsonData']['username']}")
    assert user is not None
    assert root.findtext(f"profiles/{user.findtext('profile')}/readonly") == "2"
    database = next(iter(FLOWS.values()))["environment"]["METERING_CLICKHOUSE_DATABASE"]
    assert [grant.text for grant in user.findall("grants/query")] == [f"GRANT SELECT ON {database}.*"]
    assert source["jsonData"]["defaultDatabase"] == database
    password = user.find("password")
    assert password is not None
    variable = password.attrib["from_env"]
    assert source["secureJsonData"]["password"] == f"${variable}"
    for name in ("clickhouse", "grafana"):
        assert variable in SERVICES[name]["environment"]


def test_no_real_secret_is_written_down() -> None:
    """Every password comes from the environment; what it is without one says that it is for development."""
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key:
                assert re.fullmatch(r"\$\{\w+:-development\}", value), key
