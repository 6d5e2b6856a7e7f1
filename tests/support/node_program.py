"""A node under load, for tests that kill it: `python -m tests.support.node_program` and what `main` reads.

Three threads emit into two rooms each, as fast as they can, every twentieth event durable. An utterance id is
`<run>.<room>.<number>`. The journal has a line for every durable one, written after the call returned: what it
names must arrive. With `drain` as sixth argument it emits nothing, sends what is in the spool, and ends.
"""

from __future__ import annotations

import os
import sys
import threading
from itertools import count

from clients.node import UsageEmitter

DRAIN_S = 60.0


def main() -> None:
    """Emit until killed, or drain."""
    brokers, topic, spool, journal_path, run = sys.argv[1:6]
    emitter = UsageEmitter(brokers, "n-17", spool, topic=topic, stall_timeout_s=5.0)
    if sys.argv[6:] == ["drain"]:
        sys.exit(0 if emitter.close(DRAIN_S) else 1)
    journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def work(rooms: list[str]) -> None:
        for number in count():
            durable = number % 20 == 19
            for room in rooms:
                utterance_id = f"{run}.{room}.{number}"
                with emitter.utterance(
                    session_id="s-1", user_id="u-1", room_id=room, utterance_id=utterance_id, durable=durable
                ) as spoken:
                    spoken.add_ms(asr=10, nmt=5)
                if durable:
                    os.write(journal, f"{utterance_id}\n".encode())

    threads = [
        threading.Thread(target=work, args=([f"r-{thread}a", f"r-{thread}b"],), daemon=True)
        for thread in range(3)
    ]
    for thread in threads:
        thread.start()
    threads[0].join()


if __name__ == "__main__":
    main()
