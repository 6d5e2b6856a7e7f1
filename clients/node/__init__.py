"""A node's usage emitter: times the stages of an utterance and gets the event to Kafka, whatever happens.

Needs the standard library and confluent-kafka (and prometheus-client for `.prometheus`); nothing else of this
project, and its modules import each other relatively: copy the directory if you like. Linux and macOS (it uses
flock). How to use it and what it guarantees: docs/nodes.md.
"""

from .emitter import EmitterStats, NotDurable, Refusal, RefusalReason, UsageEmitter
from .spool import SpoolInUse
from .utterance import Stage, Utterance

__all__ = [
    "EmitterStats",
    "NotDurable",
    "Refusal",
    "RefusalReason",
    "SpoolInUse",
    "Stage",
    "UsageEmitter",
    "Utterance",
]
