"""A dead letter on its Kafka topic: the original key and value, and the rest in headers (UTF-8 text)."""

from __future__ import annotations

from schemas.records import DeadLetter

Headers = list[tuple[str, bytes]]


def headers_of(letter: DeadLetter) -> Headers:
    """Everything of a dead letter that is not its key or value."""
    return [
        ("reason", letter.reason.encode()),
        ("detail", letter.detail.encode()),
        ("topic", letter.topic.encode()),
        ("log", letter.log.encode()),
        ("partition", str(letter.partition).encode()),
        ("offset", str(letter.offset).encode()),
        ("appended_at_ms", str(letter.appended_at_ms).encode()),
    ]


def letter_from(headers: Headers | None, key: bytes | None, value: bytes | None) -> DeadLetter:
    """The inverse. Raises ValueError when the headers are not those of a dead letter."""
    found = dict(headers or [])
    try:
        return DeadLetter(
            topic=found["topic"].decode(),
            log=found.get("log", b"").decode(),
            partition=int(found["partition"]),
            offset=int(found["offset"]),
            reason=found["reason"].decode(),
            detail=found["detail"].decode(),
            key=key,
            value=value,
            appended_at_ms=int(found["appended_at_ms"]),
        )
    except KeyError as missing:
        raise ValueError(f"header {missing} is missing") from None
