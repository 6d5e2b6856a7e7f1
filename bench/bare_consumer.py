"""What the client alone can do: read a topic's values to the end, in a process of its own.

Usage: python -m bench.bare_consumer HOW BOOTSTRAP TOPIC PARTITIONS MESSAGES; prints the seconds from the
assignment to the last message. HOW is `poll`, one message a call, as most programs read, or `consume`, 5 000 a
call, as the project's source does.
"""

from __future__ import annotations

import sys
import time

from confluent_kafka import Consumer, TopicPartition


def main() -> None:
    """Read, count, and print how long it took."""
    how, bootstrap, topic = sys.argv[1:4]
    partitions, messages = int(sys.argv[4]), int(sys.argv[5])
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bare",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 20,
        }
    )
    started = time.perf_counter()
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])
    read = octets = 0
    while read < messages:
        if how == "poll":
            polled = consumer.poll(0.1)
            batch = [] if polled is None else [polled]
        else:
            batch = consumer.consume(5_000, 0.1)
        for message in batch:
            if message.error() is None:
                read += 1
                octets += len(message.value() or b"")
    print(time.perf_counter() - started, flush=True)
    consumer.close()


if __name__ == "__main__":
    main()
