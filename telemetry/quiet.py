"""Defaults for those who report nothing: clients and callers whose troubles somebody else tells."""

from __future__ import annotations

import logging

KAFKA_LOGGER = logging.Logger("librdkafka", logging.CRITICAL)
"""For Kafka clients whose troubles are reported by this project's own lines; the client would write each attempt to
standard error."""


def ignore_retry(error: Exception) -> None:
    """The default for `on_retry`: nobody counts."""
