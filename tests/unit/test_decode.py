"""Which bytes are an event, which are refused, and with which reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from schemas.commands import Command, CommandKind
from schemas.decode import (
    check_append_time,
    decode_command,
    decode_event,
    fast_decode_event,
    reference_decode_event,
)
from schemas.events import Event, Lifecycle, LifecycleKind, Usage
from schemas.rejections import Rejected, RejectReason

DECODERS = [
    pytest.param(decode_event, id="decode_event"),
    pytest.param(reference_decode_event, id="reference"),
]
Decode = Callable[[bytes | None], Event]


def usage(**changes: Any) -> dict[str, Any]:
    """The usage event of the design, with changes to its envelope."""
    return {
        "specversion": "1.0",
        "id": "01JD",
        "source": "node/n-17",
        "type": "lingua.usage.utterance.v1",
        "subject": "room/r-9",
        "time": "2026-01-01T00:00:00.123Z",
        "data": usage_data(),
    } | changes


def usage_data(**changes: Any) -> dict[str, Any]:
    """The data of the design's usage event, with changes."""
    return {
        "session_id": "s-123",
        "room_id": "r-9",
        "user_id": "u-5",
        "node_id": "n-17",
        "utterance_id": "ut-1",
        "audio_ms": 4200,
        "asr_time_ms": 120,
        "nmt_time_ms": 80,
        "tts_time_ms": 200,
        "gpu_active_time_ms": 350,
        "source_lang": "zh",
        "target_lang": "en",
    } | changes


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    """The document less one key."""
    return {name: value for name, value in document.items() if name != key}


def encode(document: Any) -> bytes:
    """The document as compact JSON."""
    return json.dumps(document).encode()


def refusal(decode: Callable[[bytes | None], object], value: bytes | None) -> tuple[RejectReason, str]:
    """The reason and the detail of the refusal."""
    with pytest.raises(Rejected) as caught:
        decode(value)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize("decode", DECODERS)
def test_the_usage_event_of_the_design(decode: Decode) -> None:
    """Every field arrives, and the scope is that of the room."""
    assert decode(encode(usage())) == Usage(
        scope="room/r-9",
        source="node/n-17",
        id="01JD",
        time_ms=1_767_225_600_123,
        session_id="s-123",
        room_id="r-9",
        user_id="u-5",
        node_id="n-17",
        utterance_id="ut-1",
        audio_ms=4200,
        asr_time_ms=120,
        nmt_time_ms=80,
        tts_time_ms=200,
        gpu_active_time_ms=350,
        source_lang="zh",
        target_lang="en",
    )


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_optional_fields_may_be_absent_or_null(decode: Decode, how: str) -> None:
    """Without a room the scope is that of the session."""
    data = usage_data()
    for key in ("room_id", "audio_ms", "source_lang", "target_lang"):
        if how == "null":
            data[key] = None
        else:
            del data[key]
    event = decode(encode(usage(data=data)))
    assert isinstance(event, Usage)
    assert event.scope == "session/s-123"
    assert (event.room_id, event.audio_ms, event.source_lang, event.target_lang) == (None, None, None, None)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    ("type_name", "data", "expected"),
    [
        ("session.started", {"session_id": "s", "user_id": "u"}, ("session/s", 4, "u", "s", None)),
        (
            "session.ended",
            {"session_id": "s", "user_id": "u", "room_id": None},
            ("session/s", 5, "u", "s", None),
        ),
        ("session.ended", {"session_id": "s", "user_id": "u", "room_id": "r"}, ("room/r", 5, "u", "s", "r")),
        ("room.joined", {"room_id": "r", "user_id": "u"}, ("room/r", 1, "u", None, "r")),
        ("room.left", {"room_id": "r", "user_id": "u", "session_id": "s"}, ("room/r", 2, "u", None, "r")),
        ("room.closed", {"room_id": "r", "user_id": 5, "session_id": []}, ("room/r", 3, None, None, "r")),
        ("room.closed", {"room_id": "r", "user_id": "a b"}, ("room/r", 3, None, None, "r")),
    ],
)
def test_lifecycle_events(
    decode: Decode,
    type_name: str,
    data: dict[str, Any],
    expected: tuple[str, int, str | None, str | None, str | None],
) -> None:
    """Each kind has its scope, and fields that its type does not have are ignored, whatever they hold."""
    scope, kind, user_id, session_id, room_id = expected
    event = decode(encode(usage(type=f"lingua.{type_name}.v1", time="1970-01-01T00:00:00Z", data=data)))
    assert event == Lifecycle(
        scope, "node/n-17", "01JD", 0, LifecycleKind(kind), user_id, session_id, room_id
    )


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    ("document", "reason", "field"),
    [
        ({}, "missing_field", "specversion"),
        (usage(specversion=None), "missing_field", "specversion"),
        (usage(specversion=1.0), "wrong_type", "specversion"),
        (usage(specversion=""), "wrong_type", "specversion"),
        (usage(specversion="1.0.0"), "unsupported_version", "specversion"),
        (usage(specversion="0.3", type="x", source=""), "unsupported_version", "specversion"),
        (without(usage(source=""), "type"), "missing_field", "type"),
        (usage(type=7), "wrong_type", "type"),
        (usage(type=["lingua.room.closed.v1"]), "wrong_type", "type"),
        (usage(type=""), "wrong_type", "type"),
        (usage(type="lingua.usage.utterance.v2", source=""), "unknown_type", "type"),
        (usage(type="lingua.account.topped_up.v1"), "unknown_type", "type"),
        (without(usage(), "source"), "missing_field", "source"),
        (usage(source="", id=""), "wrong_type", "source"),
        (usage(source="é" * 257), "bad_id", "source"),
        (usage(id=7, time="x"), "wrong_type", "id"),
        (usage(id="😀" * 257), "bad_id", "id"),
        (usage(time=None), "missing_field", "time"),
        (usage(time=1_767_225_600), "wrong_type", "time"),
        (usage(time=""), "wrong_type", "time"),
        (usage(time="yesterday", data=None), "bad_time", "time"),
        (without(usage(), "data"), "missing_field", "data"),
        (usage(data=None), "missing_field", "data"),
        (usage(data=[]), "wrong_type", "data"),
        (usage(data="{}"), "wrong_type", "data"),
        (usage(data={}), "missing_field", "data.session_id"),
        (usage(data=usage_data(session_id=None)), "missing_field", "data.session_id"),
        (usage(data=usage_data(session_id=5)), "wrong_type", "data.session_id"),
        (usage(data=usage_data(session_id="")), "wrong_type", "data.session_id"),
        (usage(data=usage_data(room_id="")), "wrong_type", "data.room_id"),
        (usage(data=usage_data(room_id=False)), "wrong_type", "data.room_id"),
        (usage(data=usage_data(room_id="a/b")), "bad_id", "data.room_id"),
        (usage(data=usage_data(user_id="u-5\n")), "bad_id", "data.user_id"),
        (usage(data=usage_data(user_id="ü")), "bad_id", "data.user_id"),
        (usage(data=usage_data(user_id="٣")), "bad_id", "data.user_id"),
        (usage(data=usage_data(node_id="x" * 129)), "bad_id", "data.node_id"),
        (usage(data=usage_data(utterance_id="a b")), "bad_id", "data.utterance_id"),
        (usage(data=usage_data(audio_ms=1.0)), "wrong_type", "data.audio_ms"),
        (usage(data=usage_data(audio_ms=-1)), "out_of_range", "data.audio_ms"),
        (usage(data=usage_data(audio_ms=0.0)), "wrong_type", "data.audio_ms"),
        (usage(data=usage_data(asr_time_ms=True)), "wrong_type", "data.asr_time_ms"),
        (usage(data=usage_data(asr_time_ms="120")), "wrong_type", "data.asr_time_ms"),
        (usage(data=usage_data(asr_time_ms=None)), "missing_field", "data.asr_time_ms"),
        (usage(data=usage_data(asr_time_ms=3_600_001)), "out_of_range", "data.asr_time_ms"),
        (usage(data=usage_data(nmt_time_ms=2**63)), "out_of_range", "data.nmt_time_ms"),
        (usage(data=usage_data(tts_time_ms=-(2**64))), "out_of_range", "data.tts_time_ms"),
        (usage(data=usage_data(gpu_active_time_ms=401)), "gpu_exceeds_stages", "gpu_active_time_ms"),
        (usage(data=usage_data(source_lang="", gpu_active_time_ms=401)), "wrong_type", "data.source_lang"),
        (usage(data=usage_data(target_lang=3)), "wrong_type", "data.target_lang"),
    ],
)
def test_the_first_thing_wrong_is_the_reason(
    decode: Decode, document: dict[str, Any], reason: str, field: str
) -> None:
    """Of several things that are wrong the first to be checked counts, and the detail names it."""
    got, detail = refusal(decode, encode(document))
    assert got == reason
    assert field in detail
    assert len(detail) < 250


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "data",
    [
        usage_data(session_id="x" * 128),
        usage_data(user_id="A-Z.a_z:0-9"),
        usage_data(asr_time_ms=3_600_000, audio_ms=3_600_000),
        usage_data(asr_time_ms=0, nmt_time_ms=0, tts_time_ms=0, gpu_active_time_ms=0, audio_ms=0),
        usage_data(gpu_active_time_ms=400),
        usage_data(source_lang="中文\x00"),
        usage_data(unknown={"a": [1.5, None, {}]}),
    ],
)
def test_just_inside_the_limits(decode: Decode, data: dict[str, Any]) -> None:
    """The longest id, the largest and smallest duration, GPU time equal to the stages, fields to come."""
    event = decode(encode(usage(data=data)))
    assert isinstance(event, Usage)
    assert {name: getattr(event, name) for name in usage_data()} == without(data, "unknown")


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("text", ["é" * 256, "😀" * 256, "\n", "\x00", "a b/c", " "])
def test_source_and_id_may_hold_any_characters(decode: Decode, text: str) -> None:
    """1..256 characters are code points, and none is forbidden."""
    event = decode(encode(usage(source=text, id=text)))
    assert (event.source, event.id) == (text, text)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "extra", [{"subject": 5}, {"subject": ""}, {"datacontenttype": None}, {"dataschema": []}]
)
def test_other_attributes_are_ignored(decode: Decode, extra: dict[str, Any]) -> None:
    """Unknown attributes, and `subject`, may hold anything."""
    assert decode(encode(usage(**extra))) == decode(encode(usage()))


VALID = encode(usage())


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b" ",
        b"null",
        b"7",
        b'"x"',
        b"[" + VALID + b"]",
        VALID + VALID,
        VALID + b"x",
        VALID + b"\x00",
        VALID[:-1],
        VALID[:-1] + b",}",
        b"\xef\xbb\xbf" + VALID,
        VALID.decode().encode("utf-16"),
        VALID.decode().encode("utf-32"),
        VALID.replace(b"4200", b"NaN"),
        VALID.replace(b"4200", b"Infinity"),
        VALID.replace(b"4200", b"-Infinity"),
        VALID.replace(b"4200", b"04200"),
        VALID.replace(b"4200", b"+4200"),
        VALID.replace(b"4200", b"4200."),
        VALID.replace(b"u-5", b"u-\xff"),
        VALID.replace(b"room/r-9", b"\xff"),
        VALID.replace(b"room/r-9", b"\xed\xa0\x80"),
        VALID.replace(b"room/r-9", b"\xc0\xaf"),
        VALID.replace(b"room/r-9", b"\\ud800"),
        VALID.replace(b"room/r-9", b"\\uDC00\\uD800"),
        VALID.replace(b"room/r-9", b"\\ud800\\u0041"),
        VALID.replace(b"subject", b"\\udfff"),
        VALID.replace(b"room/r-9", b"\\x41"),
        VALID.replace(b"room/r-9", b"\\u12g4"),
        VALID.replace(b"room/r-9", b"a\nb"),
        VALID.replace(b"room/r-9", b"a\x1fb"),
        VALID.replace(b'"subject"', b"'subject'"),
        VALID.replace(b'"subject"', b"/**/" + b'"subject"'),
        VALID.replace(b" ", b"\xc2\xa0"),
        VALID.replace(b" ", b"\x0b"),
    ],
)
def test_what_is_not_json(decode: Decode, value: bytes | None) -> None:
    """Broken syntax, bad UTF-8, a BOM, NaN and lone surrogates anywhere, and JSON that is no object."""
    assert refusal(decode, value)[0] is RejectReason.NOT_JSON


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "value",
    [
        b" \t\r\n" + VALID + b"\n",
        json.dumps(usage(), indent=3).encode(),
        VALID.replace(b"room/r-9", b'\\ud83d\\ude00\\u00e9\\/\\b\\f\\n\\r\\t\\"\\\\'),
        VALID.replace(b"room/r-9", "😀\x7f\ufeff\ufffe".encode()),
        VALID.replace(b'"user_id"', b'"\\u0075ser_id"'),
        VALID.replace(b'"u-5"', b'"u-\\u0035"'),
        VALID.replace(b'"subject": "room/r-9"', b'"subject": ' + b"9" * 10_000),
        VALID.replace(b'"subject": "room/r-9"', b'"subject": -1e99999'),
        VALID.replace(b'"subject": "room/r-9"', b'"subject": ' + b"[" * 30_000 + b"]" * 30_000),
        VALID.replace(b'"subject": "room/r-9"', b'"subject": ' + b'{"a":' * 9_000 + b"{}" + b"}" * 9_000),
    ],
)
def test_json_is_accepted_however_it_is_written(decode: Decode, value: bytes) -> None:
    """White space, escapes, huge numbers and deep nesting in ignored fields change nothing."""
    assert decode(value) == decode(VALID)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"user_id": "u-5"', b'"user_id": 7, "user_id": "u-5"'),
        (b'"user_id": "u-5"', b'"user_id": "u-6", "user_id": "u-5"'),
        (b'"specversion": "1.0"', b'"specversion": "2", "specversion": "1.0"'),
        (b'"data": {', b'"data": 1, "data": {'),
        (b'"data": {', b'"data": {"room_id": "other", "more": 1}, "data": {'),
        (b'"audio_ms": 4200', b'"audio_ms": 1.5, "audio_ms": 4200'),
        (b'"type": "lingua.usage', b'"type": "lingua.room.closed.v1", "type": "lingua.usage'),
    ],
)
def test_of_a_repeated_key_the_last_counts(decode: Decode, old: bytes, new: bytes) -> None:
    """At every level, and what an earlier one holds does not matter."""
    assert old in VALID
    assert decode(VALID.replace(old, new)) == decode(VALID)


@pytest.mark.parametrize("decode", DECODERS)
def test_a_repeated_key_may_take_a_value_back(decode: Decode) -> None:
    """A last `null` makes an optional field absent and a required one missing."""
    event = decode(VALID.replace(b'"room_id": "r-9"', b'"room_id": "r-9", "room_id": null'))
    assert event.scope == "session/s-123"
    missing = VALID.replace(b'"user_id": "u-5"', b'"user_id": "u-5", "user_id": null')
    assert refusal(decode, missing)[0] is RejectReason.MISSING_FIELD


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (b"-1", "out_of_range"),
        (b"3600001", "out_of_range"),
        (b"9" * 60_000, "out_of_range"),
        (b"-" + b"9" * 60_000, "out_of_range"),
        (b"4200.0", "wrong_type"),
        (b"42e2", "wrong_type"),
        (b"4200E0", "wrong_type"),
        (b"0.0", "wrong_type"),
        (b"-0.0", "wrong_type"),
        (b"0e0", "wrong_type"),
        (b"1e999", "wrong_type"),
        (b"true", "wrong_type"),
        (b'"4200"', "wrong_type"),
        (b"[]", "wrong_type"),
        (b"[" * 30_000 + b"]" * 30_000, "wrong_type"),
    ],
)
def test_integers_have_no_fraction_and_no_exponent(decode: Decode, number: bytes, reason: str) -> None:
    """A number that equals an integer is none, and one of any size is only out of range."""
    for field, text in (("audio_ms", b"4200"), ("asr_time_ms", b"120"), ("gpu_active_time_ms", b"350")):
        got, detail = refusal(decode, VALID.replace(b'_ms": ' + text, b'_ms": ' + number))
        assert (got, detail.startswith(f"data.{field}: ")) == (reason, True)


@pytest.mark.parametrize("decode", DECODERS)
def test_minus_zero_is_the_integer_zero(decode: Decode) -> None:
    """`-0` has neither fraction nor exponent."""
    event = decode(VALID.replace(b"4200", b"-0"))
    assert isinstance(event, Usage)
    assert repr(event.audio_ms) == "0"


@pytest.mark.parametrize("decode", DECODERS)
def test_the_size_limit(decode: Decode) -> None:
    """64 KiB are accepted, one byte more is too large, whatever is in it."""
    padding = 65_536 - len(VALID)
    assert decode(VALID + b" " * padding) == decode(VALID)
    assert refusal(decode, VALID + b" " * (padding + 1))[0] is RejectReason.TOO_LARGE
    assert refusal(decode, b"\xff" * 65_537)[0] is RejectReason.TOO_LARGE
    assert refusal(decode, b"\xff" * 65_536)[0] is RejectReason.NOT_JSON


def test_the_fast_path_takes_the_usual_events() -> None:
    """If it left them to the reference nothing would be wrong, only slow."""
    assert fast_decode_event(VALID) == reference_decode_event(VALID)
    assert fast_decode_event(json.dumps(usage(subject="é"), ensure_ascii=False).encode()) is not None
    joined = usage(type="lingua.room.joined.v1", data={"room_id": "r", "user_id": "u"})
    assert fast_decode_event(encode(joined)) is not None


def test_the_clock_of_the_broker_bounds_the_time() -> None:
    """Exactly five minutes ahead is accepted, a millisecond more is not."""
    check_append_time(1_000_300_000, 1_000_000_000)
    check_append_time(-5, 1_000_000_000)
    with pytest.raises(Rejected) as caught:
        check_append_time(1_000_300_001, 1_000_000_000)
    assert caught.value.reason is RejectReason.IN_FUTURE


def command(kind: str = "topped_up", **changes: Any) -> dict[str, Any]:
    """A money command with changes to its data."""
    data = {
        "account": "user/u-5",
        "amount_us": 60_000_000,
        "request_id": "req-1",
        "reason": "a voucher",
        "actor": "operator/7",
    }
    return {
        "specversion": "1.0",
        "id": "c-1",
        "source": "accounts",
        "type": f"lingua.account.{kind}.v1",
        "time": "1970-01-01T00:00:01Z",
        "data": data | changes,
    }


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (command(), (CommandKind.TOP_UP, "user/u-5", 60_000_000, None)),
        (command(node_account="node/n"), (CommandKind.TOP_UP, "user/u-5", 60_000_000, None)),
        (command(paid_by="node/n"), (CommandKind.TOP_UP, "user/u-5", 60_000_000, "node/n")),
        (command(paid_by=None), (CommandKind.TOP_UP, "user/u-5", 60_000_000, None)),
        (command(account="node/n-1", amount_us=1), (CommandKind.TOP_UP, "node/n-1", 1, None)),
        (
            command("adjusted", amount_us=-4_000_000_000_000_000),
            (CommandKind.ADJUSTMENT, "user/u-5", -4_000_000_000_000_000, None),
        ),
        (
            command("written_off", node_account="node/n-1", amount_us=4_000_000_000_000_000),
            (CommandKind.WRITE_OFF, "user/u-5", 4_000_000_000_000_000, "node/n-1"),
        ),
    ],
)
def test_money_commands(document: dict[str, Any], expected: tuple[CommandKind, str, int, str | None]) -> None:
    """Each kind with its account, its amount and, for a write-off, the node that pays."""
    kind, account, amount_us, node_account = expected
    assert decode_command(encode(document)) == Command(
        kind, account, amount_us, "req-1", "a voucher", "operator/7", node_account, "accounts", "c-1", 1000
    )


@pytest.mark.parametrize(
    ("document", "reason", "field"),
    [
        (usage(), "unknown_type", "type"),
        (command(account="u-5"), "bad_id", "data.account"),
        (command(account="user/"), "bad_id", "data.account"),
        (command(account="user/a b"), "bad_id", "data.account"),
        (command(account="user/u\n"), "bad_id", "data.account"),
        (command(account="user/" + "x" * 129), "bad_id", "data.account"),
        (command(account="platform/revenue"), "bad_id", "data.account"),
        (command(account=""), "wrong_type", "data.account"),
        (command(amount_us=0), "out_of_range", "data.amount_us"),
        (command(amount_us=-1), "out_of_range", "data.amount_us"),
        (command(amount_us=4_000_000_000_000_001), "out_of_range", "data.amount_us"),
        (command(amount_us="1"), "wrong_type", "data.amount_us"),
        (command(amount_us=1.0), "wrong_type", "data.amount_us"),
        (command(amount_us=True), "wrong_type", "data.amount_us"),
        (command("adjusted", amount_us=0), "out_of_range", "data.amount_us"),
        (command("adjusted", amount_us=-4_000_000_000_000_001), "out_of_range", "data.amount_us"),
        (command(request_id="a/b"), "bad_id", "data.request_id"),
        (command(request_id=None), "missing_field", "data.request_id"),
        (command(reason=""), "wrong_type", "data.reason"),
        (command(reason="x" * 257), "bad_id", "data.reason"),
        (command(actor=None), "missing_field", "data.actor"),
        (command("written_off"), "missing_field", "data.node_account"),
        (command("written_off", node_account="user/u-5"), "bad_id", "data.node_account"),
        (command("written_off", account="node/n-1", node_account="node/n-1"), "bad_id", "data.account"),
        (command("written_off", amount_us=-1, node_account="node/n"), "out_of_range", "data.amount_us"),
    ],
)
def test_wrong_money_commands(document: dict[str, Any], reason: str, field: str) -> None:
    """The same envelope rules as for events, and those of the amounts and accounts."""
    got, detail = refusal(decode_command, encode(document))
    assert got == reason
    assert detail.startswith(f"{field}: ")


def test_a_command_that_is_not_json() -> None:
    """The rules for bytes are the same on both topics."""
    assert refusal(decode_command, None)[0] is RejectReason.NOT_JSON
    assert refusal(decode_command, b" " * 65_537)[0] is RejectReason.TOO_LARGE
    assert refusal(decode_command, b'{"a": NaN}')[0] is RejectReason.NOT_JSON
