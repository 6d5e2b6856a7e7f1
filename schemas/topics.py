"""The Kafka topics and the one limit that all of them share."""

from __future__ import annotations

EVENTS = "lingua.events"
"""Usage and lifecycle events, keyed by scope."""

COMMANDS = "lingua.commands"
"""Money commands, keyed by account."""

DEAD_LETTERS = "lingua.dead-letters"
"""Messages that were refused: the original bytes, with the reason in the headers."""

ALERTS = "lingua.alerts"
"""Balances that fell past a threshold, keyed by account: for the scheduler, which stops sessions."""

MAX_MESSAGE_BYTES = 65_536
"""The largest message that is accepted; one byte more is `too_large`."""
