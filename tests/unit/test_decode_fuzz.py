"""Whatever bytes come, the intake answers with an event or with one of the fixed reasons, at a bounded price."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from random import Random
from statistics import median
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from flows.intake import accept_batch, dead_letter
from schemas.cloudevents import EVENT_MODELS
from schemas.commands import COMMAND_MODELS, Command
from schemas.dead_letter_headers import headers_of, letter_from
from schemas.decode import (
    FUTURE_TOLERANCE_MS,
    decode_command,
    decode_event,
    fast_decode_event,
    reference_decode_event,
)
from schemas.events import Event
from schemas.messages import RawMessage
from schemas.rate_card import load_rate_card
from schemas.rejections import Rejected, RejectReason
from schemas.strict_json import MAX_INTEGER_DIGITS, Json, NotJson, parse, scan
from schemas.topics import MAX_MESSAGE_BYTES
from tests.support.junk import GOOD, USAGE, worst_junk

MANY = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
CARD = load_rate_card(None)
APPENDED_AT_MS = 1_767_225_600_000

OF_A_MESSAGE_ALONE = set(RejectReason) - {
    RejectReason.IN_FUTURE,
    RejectReason.NO_RATE,
    RejectReason.IDENTITY_CONFLICT,
    RejectReason.REQUEST_CONFLICT,
    RejectReason.BAD_HEADERS,
}
"""The reasons that need neither the log, nor the rate card, nor what came before."""

COMMAND: dict[str, Any] = USAGE | {
    "type": "lingua.account.written_off.v1",
    "data": {
        "account": "user/u-5",
        "amount_us": 60_000_000,
        "request_id": "r-1",
        "reason": "why",
        "actor": "operator/o-1",
        "node_account": "node/n-17",
    },
}

HOSTILE_NUMBERS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "-0",
        "-0.0",
        "0e0",
        "1e-9",
        "1E400",
        "-1e400",
        "1e",
        "0x10",
        "1_0",
        "٣",
    ),
    *(str(base + change) for base in (2**31, 2**32, 2**53, 2**63, 2**64, 10**39) for change in (-1, 0, 1)),
    *(str(-(2**63) + change) for change in (-1, 0, 1)),
    *("9" * 41, "-" + "9" * 4_301, "1" + "0" * 60_000, "0." + "3" * 60_000, "1e" + "9" * 5_000),
)
HOSTILE_TEXTS = (
    *(
        '""',
        '" "',
        '"a\\u0000b"',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\uD83Dx"',
        '"\\u00e9"',
    ),
    *('"\ufeff"', '"\u2028"', '"\U0010ffff"', '"\x7f"', '"\x1f"', '"a', '"\\x"', '"\\u12"', '"\\', "'a'"),
    *('"' + "a" * 257 + '"', '"' + "a" * 60_000 + '"', '"' + "\\u0041" * 9_000 + '"', '"' + "é" * 129 + '"'),
    *(
        '"lingua.usage.utterance.v1"',
        '"1.0"',
        '"../../etc"',
        '"a\\nb"',
        '"{}"',
        '"user/u}"',
        '"%s"',
        '"a|b=1;c"',
    ),
)
HOSTILE_TIMES = (
    *(
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59.999Z",
        "9999-12-31T23:59:59-23:59",
    ),
    *(
        "2026-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T23:59:60Z",
        "+2026",
        "",
    ),
    *("1969-12-31T23:59:59.999Z", "1970-01-01T00:00:00Z", "2026-01-01T00:00:00." + "9" * 50_000 + "Z", "now"),
    *(
        "2026-01-01T00:05:00.000Z",
        "2026-01-01T00:05:00.001Z",
        "2026-01-01T00:00:00+99:99",
        "２026-01-01T00:00:00Z",
    ),
)
HOSTILE_NESTS = (
    *("[]", "{}", "[[[[]]]]", "[" * 30_000 + "]" * 30_000, '{"":' * 9_000 + "1" + "}" * 9_000, "[" * 30_000),
    *('{"a":1,"a":{"a":[]}}', "[" + "[]," * 20_000 + "[]]", "[" + "1," * 30_000 + "1]", '{"":' * 9_000),
    *(
        "[{" * 5,
        "[1,]",
        "[,1]",
        '{"a":1,}',
        '{"a"}',
        "{1:2}",
        "]",
        "}",
        '[{"a":[}]',
        "null",
        "true",
        "falsey",
        "",
    ),
)
HOSTILE = (*HOSTILE_NUMBERS, *HOSTILE_TEXTS, *(f'"{text}"' for text in HOSTILE_TIMES), *HOSTILE_NESTS)
"""Values as JSON text, most of them wrong, for any place of a message."""

SPACES = ("", " ", "\t\r\n ", "\x0b", "\xa0", "\u2028", "\x00", "\ufeff", "//", "/**/")


def member_lists(document: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The members of the envelope without `data`, and those of `data`, with their values as JSON text."""
    envelope = [(key, json.dumps(value)) for key, value in document.items() if key != "data"]
    return envelope, [(key, json.dumps(value)) for key, value in document["data"].items()]


def written(members: list[tuple[str, str]], space: str) -> str:
    return "{" + f",{space}".join(f"{json.dumps(key)}:{value}" for key, value in members) + "}"


@st.composite
def changed_messages(draw: st.DrawFn) -> bytes:
    """A valid event or command of which up to four members are replaced, repeated, or gone."""
    chance = Random(draw(st.integers(0, 2**48)))
    document = chance.choice((USAGE, COMMAND)) | {"type": chance.choice((*EVENT_MODELS, *COMMAND_MODELS))}
    envelope, data = member_lists(document)
    for _ in range(chance.randrange(5)):
        members = chance.choice((envelope, data))
        name = chance.choice((*(key for key, _ in members), "extra", "", "\x00", "k" * 50_000))
        how = chance.choice(("replace", "repeat", "remove"))
        if how != "repeat":
            members[:] = [member for member in members if member[0] != name]
        if how != "remove":
            members.insert(chance.randrange(len(members) + 1), (name, chance.choice(HOSTILE)))
    inner = chance.choice((written(data, chance.choice(("", " "))), chance.choice(HOSTILE)))
    if chance.random() < 0.8:
        inner = written(data, "")
    envelope.insert(chance.randrange(len(envelope) + 1), ("data", inner))
    space = chance.choice(SPACES) if chance.random() < 0.2 else ""
    return (space + written(envelope, "") + chance.choice(("", "", "", "\n", "x", "{}", space))).encode()


@st.composite
def damaged_messages(draw: st.DrawFn) -> bytes:
    """A valid event of which bytes are cut out, put in, swapped or repeated."""
    chance = Random(draw(st.integers(0, 2**48)))
    value = json.dumps(chance.choice((USAGE, COMMAND)), ensure_ascii=chance.random() < 0.5).encode()
    pieces = (
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\xf4\x90\x80\x80",
        b"\\",
        b'"',
        b"\x00",
        b"{",
        b"}",
        b"[",
        b",",
    )
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(value))
        upto = at + chance.choice((0, 1, 1, 5, 60))
        put = chance.choice((b"", chance.randbytes(3), chance.choice(pieces), value[at:upto] * 2))
        value = value[:at] + put + value[upto:]
        if not value:
            return b""
    return value


ANY_BYTES = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ANY_JSON = JSON_VALUES.map(lambda value: json.dumps(value).encode())
MESSAGES = changed_messages() | damaged_messages() | ANY_JSON | ANY_BYTES


def answer(decode: Callable[[bytes], Event | Command], value: bytes) -> Event | Command | RejectReason:
    """What was decoded, or the reason; every other exception is a failure of the test that asks."""
    try:
        return decode(value)
    except Rejected as rejected:
        assert type(rejected.reason) is RejectReason
        assert 0 < len(rejected.detail) < 300
        rejected.detail.encode("utf-8")
        return rejected.reason


@given(MESSAGES)
@settings(MANY, max_examples=1_000)
def test_any_message_is_an_event_or_has_one_of_the_reasons(value: bytes) -> None:
    """Bytes from nowhere, JSON of any kind, and good messages with hostile parts; as an event and as a command."""
    expected = answer(reference_decode_event, value)
    assert answer(decode_event, value) == expected
    claimed = fast_decode_event(value)
    assert claimed is None or claimed == expected
    for found in (expected, answer(decode_command, value)):
        if isinstance(found, RejectReason):
            assert found in OF_A_MESSAGE_ALONE
            event(found.value)
        else:
            event(type(found).__name__)


@given(st.lists(MESSAGES | st.none(), max_size=6), st.sampled_from([0, 1, APPENDED_AT_MS, 2**53, 2**63 - 1]))
@MANY
def test_the_intake_loses_no_message_of_a_batch(values: list[bytes | None], appended_at_ms: int) -> None:
    """Whatever the append time is: each message is accepted, or a dead letter that survives its own headers."""
    batch = [
        RawMessage("lingua.events", 3, offset, b"\xff\x00key", value, appended_at_ms, None, "log")
        for offset, value in enumerate(values)
    ]
    accepted, refused = accept_batch(batch, CARD)
    places = sorted(
        [located.message.offset for located in accepted] + [message.offset for message, _ in refused]
    )
    assert places == list(range(len(batch)))
    assert all(located.event.time_ms <= appended_at_ms + FUTURE_TOLERANCE_MS for located in accepted)
    for message, rejected in refused:
        letter = dead_letter(message, rejected.reason, rejected.detail)
        assert letter.value == message.value
        assert letter_from(list(headers_of(letter)), letter.key, letter.value) == letter


def capped(value: Json) -> str:
    """The value with its types; integers beyond the limit are all the same."""
    if isinstance(value, list):
        return "[" + ",".join(capped(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{capped(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int) and abs(value) >= 10 ** (MAX_INTEGER_DIGITS - 1):
        return "huge" if value > 0 else "-huge"
    return repr(value)


def read(reader: Callable[[bytes], Json], value: bytes) -> str | None:
    try:
        return capped(reader(value))
    except NotJson as problem:
        assert str(problem)
        return None
    except RecursionError:
        # Of `capped` alone: the value was read.
        return "deep"


@given(MESSAGES | st.sampled_from(HOSTILE).map(str.encode))
@settings(MANY, max_examples=1_000)
def test_the_parser_reads_what_the_definition_reads(value: bytes) -> None:
    """`parse` and `scan` take the same bytes, for the same value."""
    assert read(parse, value) == read(scan, value)


FRAGMENTS: tuple[str, ...] = (
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"a"',
    '"',
    "\\",
    "\\u0041",
    "\\ud800",
    "\\udc00",
    "\\ud83d\\ude00",
    "\\n",
)
FRAGMENTS += (
    "1",
    "-",
    "0",
    ".5",
    "e3",
    "-0",
    "true",
    "null",
    "nul",
    "NaN",
    " ",
    "\n",
    "\x0b",
    "\x00",
    "é",
    "٣",
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(lambda parts: "".join(parts).encode()))
@settings(MANY, max_examples=2_000)
def test_the_parser_reads_what_the_definition_reads_of_fragments(value: bytes) -> None:
    """Pieces of JSON in any order, alone and as part of a string."""
    for text in (value, b'"' + value + b'"', b'["' + value + b'",' + value + b"]"):
        assert read(parse, text) == read(scan, text)


@pytest.mark.parametrize("head", [b'"', b'{"a":"', b'["', b"["])
@pytest.mark.parametrize(
    "unit", [b'\\"', b"\\\\", b"\\u00", b'"', b"0", b"-", b" ", b"a", b"[", b'{"":', b"1e"]
)
def test_text_that_never_ends_is_read_once(head: bytes, unit: bytes) -> None:
    """Twice the bytes cost about twice the time: no part is tried again from its middle. Quadratic would be 4,
    and 16 in two steps; the shortest of several turns counts, and the limit is wide."""

    def seconds(length: int) -> float:
        value = head + unit * (length // len(unit)) + b"\x01"
        turns = []
        for _ in range(5):
            start = time.thread_time()
            for reader in (parse, scan):
                with pytest.raises(NotJson):
                    reader(value)
            turns.append(time.thread_time() - start)
        return min(turns)

    assert seconds(64_000) < 10 * seconds(16_000)


def test_refusing_costs_about_what_accepting_costs() -> None:
    """Junk of the most expensive kinds against as many bytes of good events, in turns; the ratio is printed, and
    what is asserted is only that it has a bound: what nests a thousand deep is the dearest, some sixty times."""
    worst = worst_junk(MAX_MESSAGE_BYTES)
    for value in worst.values():
        assert len(value) <= MAX_MESSAGE_BYTES
        assert isinstance(answer(decode_event, value), RejectReason)

    def ns_per_byte(value: bytes) -> float:
        times = math.ceil(MAX_MESSAGE_BYTES / len(value))
        start = time.thread_time_ns()
        for _ in range(times):
            answer(decode_event, value)
        return (time.thread_time_ns() - start) / (times * len(value))

    ratios: dict[str, list[float]] = {name: [] for name in worst}
    for _ in range(7):
        for name, value in worst.items():
            ratios[name].append(ns_per_byte(value) / ns_per_byte(GOOD))
    medians = {name: median(found) for name, found in ratios.items()}
    for name, ratio in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{ratio:6.1f} times the price of good bytes: {name}")
    assert max(medians.values()) < 100


def test_every_reason_of_a_message_alone_is_met() -> None:
    """The hostile parts are hostile enough: each reason is somebody's."""
    chance = Random(7)
    met: set[RejectReason] = set()
    for _ in range(3_000):
        envelope, data = member_lists(chance.choice((USAGE, COMMAND)))
        members = chance.choice((envelope, data))
        at = chance.randrange(len(members))
        members[at] = (members[at][0], chance.choice((*HOSTILE, "401")))
        found = answer(decode_event, written([*envelope, ("data", written(data, ""))], "").encode())
        if isinstance(found, RejectReason):
            met.add(found)
    assert met == OF_A_MESSAGE_ALONE - {RejectReason.TOO_LARGE}
