"""The fast decoder accepts and refuses the same bytes as the reference, with the same value or reason."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from schemas.cloudevents import (
    EVENT_MODELS,
    ROOM_CLOSED_TYPE,
    ROOM_JOINED_TYPE,
    SESSION_ENDED_TYPE,
    USAGE_TYPE,
)
from schemas.decode import decode_event, fast_decode_event, reference_decode_event
from schemas.events import Event
from schemas.rejections import Rejected

_MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

IDS = ("a", "Z9", "._:-", "0", "u-5", "x" * 128)
TEXTS = (
    "a",
    " ",
    "\n",
    "\x00",
    "\x7f",
    "é",
    "中文",
    "😀",
    '"',
    "\\",
    "/",
    "\ufeff",
    "\uffff",
    "é" * 256,
    "😀" * 256,
)
DURATIONS = (0, 1, 2, 4200, 3_599_999, 3_600_000)
DATES = ("0001-01-01", "1969-12-31", "1970-01-01", "2000-02-29", "2024-02-29", "2026-01-01", "9999-12-31")
CLOCKS = ("00:00:00", "23:59:59", "12:34:56")
FRACTIONS = ("", ".0", ".123", ".999", ".1239", ".000000001", "." + "9" * 30)
OFFSETS = ("Z", "Z", "Z", "+00:00", "-00:00", "+05:30", "-23:59", "+23:59")
LIFECYCLE_TYPES = (SESSION_ENDED_TYPE, ROOM_JOINED_TYPE, ROOM_CLOSED_TYPE)
TYPES = (USAGE_TYPE, *sorted(EVENT_MODELS))


@st.composite
def valid_documents(draw: st.DrawFn) -> dict[str, Any]:
    """A document of any type that both decoders accept; one drawn seed makes all choices, for speed."""
    choose = Random(draw(st.integers(0, 2**32))).choice
    stages = [choose(DURATIONS) for _ in range(3)]
    data = {
        "session_id": choose(IDS),
        "room_id": choose(IDS),
        "user_id": choose(IDS),
        "node_id": choose(IDS),
        "utterance_id": choose(IDS),
        "audio_ms": choose((None, *DURATIONS)),
        "asr_time_ms": stages[0],
        "nmt_time_ms": stages[1],
        "tts_time_ms": stages[2],
        "gpu_active_time_ms": min(choose((0, sum(stages), sum(stages) // 2)), 3_600_000),
        "source_lang": choose((None, *TEXTS)),
        "target_lang": choose((None, *TEXTS)),
    }
    type_name = choose(TYPES)
    if "room" not in type_name and choose((True, False)):
        del data["room_id"]
    return {
        "specversion": "1.0",
        "type": type_name,
        "source": choose(TEXTS),
        "id": choose(TEXTS),
        "time": choose(DATES) + "T" + choose(CLOCKS) + choose(FRACTIONS) + choose(OFFSETS),
        "subject": choose((None, *TEXTS)),
        "data": data,
    }


ODD_VALUES = [
    *(
        "null",
        "true",
        "false",
        '""',
        '"x"',
        "{}",
        "[]",
        "[[]]",
        '{"a":{"b":[]}}',
        "NaN",
        "Infinity",
        "-Infinity",
    ),
    *(
        "0",
        "-0",
        "-1",
        "1.0",
        "0.0",
        "-0.0",
        "1e3",
        "1E0",
        "1e999",
        "01",
        "+1",
        ".5",
        "1.",
        "1e",
        "--1",
        "0x1",
    ),
    *(
        "3600000",
        "3600001",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "9" * 5000,
    ),
    *(
        "1" * 5000 + ".0",
        '"1.0"',
        '"1.1"',
        "1.1",
        '"lingua.usage.utterance.v1"',
        '"lingua.room.closed.v1"',
    ),
    *(
        '"a b"',
        '"a\\n"',
        '"a\n"',
        '"a\\u000a"',
        '"a/b"',
        '"é"',
        '"e\\u0301"',
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"😀"',
    ),
    *(
        '"\\x41"',
        '"\\u00"',
        '"\x00"',
        '"\x7f"',
        '"\\/"',
        '"\ufeff"',
        '"' + "a" * 128 + '"',
        '"' + "a" * 129 + '"',
    ),
    *(
        '"' + "é" * 256 + '"',
        '"' + "é" * 257 + '"',
        '"' + "😀" * 256 + '"',
        "tru",
        "nul",
        "nulll",
        "'x'",
        "",
    ),
    *(
        "[1,]",
        "[,1]",
        "[1 2]",
        '{"a":1,}',
        '{"a" 1}',
        "{1:1}",
        '{"a":1,"a":"\\udc00"}',
        '"a"b"',
        "[" * 3000 + "]" * 3000,
    ),
    *(
        "[" * 3000,
        '{"a":' * 2000 + "1" + "}" * 2000,
        "/**/1",
        '"2026-02-30T00:00:00Z"',
        '"2024-02-29T00:00:00Z"',
    ),
    *('"0000-01-01T00:00:00Z"', '"0001-01-01T00:00:00+23:59"', '"9999-12-31T23:59:59.9999-23:59"'),
    *(
        '"2026-01-01T00:00:60Z"',
        '"2026-01-01T24:00:00Z"',
        '"2026-01-01t00:00:00Z"',
        '"2026-01-01T00:00:00z"',
    ),
    *(
        '"2026-01-01 00:00:00Z"',
        '"2026-01-01T00:00:00"',
        '"2026-01-01T00:00:00.Z"',
        '"2026-01-01T00:00:00,5Z"',
    ),
    *('"2026-01-01T00:00:00+24:00"', '"2026-01-01T00:00:00+00:60"', '"2026-01-01T00:00:00+0000"'),
    *(
        '"2026-01-01T00:00:00Z\\n"',
        '"２026-01-01T00:00:00Z"',
        '"2026-01-01T00:00:00.１23Z"',
        '" 2026-01-01T00:00:00Z"',
    ),
]
"""Values as JSON text, many of them wrong."""

ODD_SPACE = st.sampled_from(
    ["", " ", "\t", "\n", "\r\n", "  ", "\x0b", "\x0c", "\xa0", "\u2028", "\ufeff", "\x00"]
)


def outcome(decode: Any, value: bytes) -> Event | tuple[str, str]:
    """The event, or the reason and detail of the refusal."""
    try:
        event: Event = decode(value)
    except Rejected as rejected:
        return rejected.reason.value, rejected.detail
    return event


def check(value: bytes) -> Event | tuple[str, str]:
    """Both decoders agree: the fast path claims nothing, or what the reference says; in types too."""
    expected = outcome(reference_decode_event, value)
    claimed = fast_decode_event(value)
    assert claimed is None or (claimed == expected and repr(claimed) == repr(expected))
    if isinstance(expected, tuple):
        assert len(expected[1]) < 300
        expected[1].encode("utf-8")
    return expected


PLAIN_DATA = {
    "session_id": "s",
    "room_id": "r",
    "user_id": "u",
    "node_id": "n",
    "utterance_id": "t",
    "audio_ms": 9,
    "asr_time_ms": 1,
    "nmt_time_ms": 2,
    "tts_time_ms": 3,
    "gpu_active_time_ms": 6,
    "source_lang": "zh",
    "target_lang": "en",
    "unknown": "",
}
PLAIN = {
    "specversion": "1.0",
    "type": "",
    "source": "s",
    "id": "i",
    "time": "2026-01-01T00:00:00Z",
    "subject": "",
    "data": PLAIN_DATA,
}


LIFECYCLE_FIELDS = (*PLAIN, "session_id", "room_id", "user_id", "unknown")


@pytest.mark.parametrize(
    ("type_name", "field"),
    [(USAGE_TYPE, field) for field in (*PLAIN, *PLAIN_DATA)]
    + [(type_name, field) for type_name in LIFECYCLE_TYPES for field in LIFECYCLE_FIELDS],
)
def test_every_field_with_every_odd_value(type_name: str, field: str) -> None:
    """In place of the good value, and before it as a repeated key, for each type of event."""
    good = json.dumps(PLAIN | {"type": type_name})
    member = f'"{field}": ' + json.dumps((PLAIN | PLAIN_DATA | {"type": type_name})[field])
    assert member in good
    without_room = good.replace('"room_id": "r", ', "")
    for odd in ODD_VALUES:
        check(good.replace(member, f'"{field}": {odd}').encode())
        check(without_room.replace(member, f'"{field}": {odd}').encode())
        check(good.replace(member, f'"{field}": {odd}, {member}').encode())
    check(good.replace(member, '"_": 1').encode())


def test_the_size_limit_is_that_of_the_reference() -> None:
    """An event that is padded to the limit, and by one byte more."""
    value = json.dumps(PLAIN | {"type": USAGE_TYPE}).encode()
    assert not isinstance(check(value.ljust(65_536)), tuple)
    assert isinstance(check(value.ljust(65_537)), tuple)


@given(valid_documents(), st.booleans(), st.sampled_from([None, 1]))
@_MANY
def test_valid_events_are_accepted_by_both(
    document: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    """Whatever keeps the rules is accepted, escaped or not, compact or indented."""
    value = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    event = check(value)
    assert not isinstance(event, tuple)
    assert decode_event(value) == event


@given(
    valid_documents(),
    st.lists(
        st.tuples(
            st.sampled_from(["specversion", "type", "source", "id", "time", "subject", "data", "x\x7f", ""])
            | st.sampled_from(["session_id", "room_id", "user_id", "node_id", "utterance_id", "zz"])
            | st.sampled_from(
                ["audio_ms", "asr_time_ms", "nmt_time_ms", "gpu_active_time_ms", "source_lang"]
            ),
            st.booleans(),
            st.sampled_from(["replace", "append", "prepend", "remove"]),
            st.sampled_from(ODD_VALUES),
        ),
        min_size=1,
        max_size=3,
    ),
    ODD_SPACE,
    ODD_SPACE,
)
@settings(_MANY, max_examples=600)
def test_wrong_fields_are_refused_alike(
    document: dict[str, Any], changes: list[tuple[str, bool, str, str]], before: str, after: str
) -> None:
    """Fields that are replaced, repeated or removed, in the envelope and in data, by values of all sorts."""
    data = [(key, json.dumps(value)) for key, value in document.pop("data").items()]
    envelope = [(key, json.dumps(value)) for key, value in document.items()]
    for key, in_data, how, odd in changes:
        members = data if in_data else envelope
        if how in ("replace", "remove"):
            members[:] = [member for member in members if member[0] != key]
        if how != "remove":
            members.insert(0 if how == "prepend" else len(members), (key, odd))
    if not any(key == "data" for key, _ in envelope):
        envelope.append(("data", _object(data, " ")))
    check((before + _object(envelope, before if before.isspace() else "") + after).encode("utf-8"))


def _object(members: list[tuple[str, str]], space: str) -> str:
    return "{" + ("," + space).join(f'{space}"{key}":{value}{space}' for key, value in members) + "}"


@given(valid_documents(), st.data())
@settings(_MANY, max_examples=400)
def test_damaged_bytes_are_refused_alike(document: dict[str, Any], data: st.DataObject) -> None:
    """Bytes that are flipped, dropped, inserted or cut off anywhere."""
    value = bytearray(json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(value) - 1))
        damage = data.draw(
            st.sampled_from(
                [b"\xff", b"\xed\xa0\x80", b"\xc3", b"\\", b"\\u", b'"', b"\x00", b"{", b",", b"1"]
            )
        )
        length = data.draw(st.integers(0, 2))
        value[at : at + length] = damage
    check(bytes(value))
    check(bytes(value[: data.draw(st.integers(0, len(value)))]))


@given(st.binary(max_size=60))
@example(b"")
@example(b"{}")
@example(b"[" * 65_536)
@example(b"[" * 32_768 + b"]" * 32_768)
@example(b'{"a":' * 13_000)
@example(b" " * 65_536)
@example(b" " * 65_537)
@example(b'"' + b"a" * 65_535)
@example(b"9" * 65_536)
@example(b'{"specversion":"1.0","type":"lingua.room.closed.v1"}')
@_MANY
def test_any_bytes_are_refused_alike(value: bytes) -> None:
    """Bytes that have nothing to do with an event are refused, never a crash."""
    refusal = check(value)
    assert isinstance(refusal, tuple)
    assert outcome(decode_event, value) == refusal


@pytest.mark.parametrize("nested", ["[" * 9_000 + "]" * 9_000, '{"a":' * 9_000 + "1" + "}" * 9_000])
def test_deep_nesting_in_an_ignored_field_is_accepted(nested: str) -> None:
    """JSON has no limit on depth, and an unknown field may hold anything."""
    event = check(
        b'{"specversion":"1.0","type":"%s","source":"s","id":"i","time":"2026-01-01T00:00:00Z",'
        b'"data":{"room_id":"r","more":%s}}' % (ROOM_CLOSED_TYPE.encode(), nested.encode())
    )
    assert not isinstance(event, tuple)
