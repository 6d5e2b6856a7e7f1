"""The write-off flow: every period, users below zero are paid for from the credit of their bound nodes.

    clock -> plan and send (accounts database, `lingua.commands`), close (accounts database)

`metering.write_off` says in which order, and what a death between any two effects leaves. The flow keeps no
state of its own: at its start it takes up the period that lies now, and with it whatever is open of any period
before.
"""

from __future__ import annotations

from collections.abc import Callable

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import Source
from bytewax.outputs import DynamicSink, StatelessSinkPartition

FLOW = "write_off"


class WriteOffSink(DynamicSink[int]):
    """Calls `run` with the start (ms) of the newest period of each batch; `run` comes back when it is done with
    it."""

    def __init__(self, run: Callable[[int], None]) -> None:
        self._run = run

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _WriteOffPartition:
        """One a worker; only one of them gets anything, since there is one clock."""
        return _WriteOffPartition(self._run)


class _WriteOffPartition(StatelessSinkPartition[int]):
    def __init__(self, run: Callable[[int], None]) -> None:
        self._run = run

    def write_batch(self, items: list[int]) -> None:
        """Blocks until the period is done with."""
        if items:
            self._run(max(items))


def build_flow(periods: Source[int], run: Callable[[int], None]) -> Dataflow:
    """The flow."""
    flow = Dataflow(FLOW)
    op.output("write_off", op.input("periods", flow, periods), WriteOffSink(run))
    return flow
