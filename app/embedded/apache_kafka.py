"""Apache Kafka 4 (KRaft, one node) from Maven Central: what `make test-kafka` runs the integration suite on.

Needs `java` (17 or newer) and `mvn`; their absence is an error. The jars are fetched once, into
`.cache/kafka-<version>` beside the source. Data survives a restart, and so does the cluster's identity.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from app.embedded.broker import kafka_answers
from app.embedded.process import LOOPBACK, Service, ServiceError, free_port, last_line

VERSION = "4.1.1"

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / f"kafka-{VERSION}"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>lingua</groupId><artifactId>kafka-libs</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""


def service(directory: Path, port: int) -> Service:
    """The broker with its data in `directory` (made and formatted if missing), on a loopback port.

    Blocks while the jars are fetched (the first time) and the storage is formatted (a new directory). Raises
    ServiceError when java or mvn is missing or fails.
    """
    java = _program("java")
    classpath = f"{fetch_jars()}/*"
    directory.mkdir(parents=True, exist_ok=True)
    properties = directory / "server.properties"
    properties.write_text(_properties(directory, port, free_port(frozenset({port}))))
    if not (directory / "data" / "meta.properties").exists():
        _format(java, classpath, directory, properties)
    return Service(
        name="broker",
        argv=(
            java,
            "-Xmx512m",
            "-Xms256m",
            "-XX:+UseSerialGC",
            # The node is small and restarted often: compile quickly rather than well.
            "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp",
            classpath,
            "kafka.Kafka",
            str(properties),
        ),
        port=port,
        healthy=lambda: kafka_answers(port),
        stop_deadline_s=30.0,
        start_deadline_s=90.0,
    )


def fetch_jars() -> Path:
    """The directory with Kafka's jars; fetched with Maven when it is not there. Raises ServiceError."""
    libs = _CACHE / "libs"
    if libs.is_dir():
        return libs
    maven = _program("mvn")
    _CACHE.mkdir(parents=True, exist_ok=True)
    # Fetched aside and renamed when complete, so that a broken download is never taken for the real thing.
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        pom = Path(scratch) / "pom.xml"
        pom.write_text(_POM)
        log = _CACHE / "maven.log"
        fetched = Path(scratch) / "libs"
        command = [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies"]
        _run([*command, f"-DoutputDirectory={fetched}"], log, "maven could not fetch Kafka's jars")
        try:
            fetched.rename(libs)
        except OSError:
            # Another process was faster, and its copy is as good.
            if not libs.is_dir():
                raise
    return libs


def _format(java: str, classpath: str, directory: Path, properties: Path) -> None:
    cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    # An id that starts with a dash would be read as an option.
    command = [java, "-cp", classpath, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}"]
    _run([*command, "-c", str(properties)], directory / "format.log", "Kafka could not format its storage")


def _properties(directory: Path, port: int, controller_port: int) -> str:
    options = {
        "process.roles": "broker,controller",
        "node.id": 1,
        # A fixed voter, not a dynamic quorum: so the controller's port may be another at each start.
        "controller.quorum.voters": f"1@{LOOPBACK}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": directory / "data",
        "auto.create.topics.enable": "false",
        "num.partitions": 4,
        "offsets.topic.num.partitions": 4,
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        # A restarted broker waits until the controller has given up its predecessor; the default is 9 s.
        "broker.session.timeout.ms": 2000,
        "broker.heartbeat.interval.ms": 500,
    }
    return "".join(f"{name}={value}\n" for name, value in options.items())


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ServiceError(f"Apache Kafka needs {name}, and there is none on the PATH")
    return path


def _run(command: list[str], log: Path, failure: str) -> None:
    with log.open("wb") as output:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        raise ServiceError(f"{failure} (exit code {done.returncode}){last_line(log)}; see {log}")
