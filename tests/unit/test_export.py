"""The exported documents are current, and say what the decoders do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from schemas.alerts import ALERT_MODELS
from schemas.cloudevents import EVENT_MODELS
from schemas.commands import COMMAND_MODELS
from schemas.export import EXPORTED, ROOT, documents
from schemas.rejections import RejectReason
from schemas.settings import Settings
from schemas.topics import ALERTS, COMMANDS, DEAD_LETTERS, EVENTS

DATA: dict[str, dict[str, Any]] = {
    "lingua.usage.utterance.v1": {
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
        "target_lang": None,
    },
    "lingua.session.started.v1": {"session_id": "s", "user_id": "u"},
    "lingua.session.ended.v1": {"session_id": "s", "user_id": "u", "room_id": "r"},
    "lingua.room.joined.v1": {"room_id": "r", "user_id": "u"},
    "lingua.room.left.v1": {"room_id": "r", "user_id": "u"},
    "lingua.room.closed.v1": {"room_id": "r"},
}
MONEY = {"account": "user/u", "amount_us": 1, "request_id": "q", "reason": "why", "actor": "who"}
DATA |= {
    "lingua.account.topped_up.v1": MONEY,
    "lingua.account.adjusted.v1": MONEY | {"amount_us": -1},
    "lingua.account.written_off.v1": MONEY | {"node_account": "node/n"},
    "lingua.account.granted.v1": MONEY
    | {
        "priority": 1,
        "effective_from": "2026-01-01T00:00:00Z",
        "expires_at": "2026-02-01T00:00:00Z",
    },
}


def exported(name: str) -> Any:
    """A document as it lies in the repository."""
    return json.loads((ROOT / EXPORTED / name).read_text(encoding="utf-8"))


def event(type_name: str, **changes: Any) -> dict[str, Any]:
    """A good message of this type, with changes to its data."""
    return {
        "specversion": "1.0",
        "type": type_name,
        "source": "s",
        "id": "i",
        "time": "2026-01-01T00:00:00Z",
        "data": DATA[type_name] | changes,
    }


def test_the_files_are_current() -> None:
    """What `python -m schemas.export` would write is what lies there, no more and no less."""
    for path, content in documents().items():
        assert (ROOT / path).read_text(encoding="utf-8") == content, f"{path}: run python -m schemas.export"
    there = {path.relative_to(ROOT) for path in (ROOT / EXPORTED).iterdir()}
    assert there == {path for path in documents() if path.is_relative_to(EXPORTED)}


@pytest.mark.parametrize("type_name", [*EVENT_MODELS, *COMMAND_MODELS])
def test_json_schema_accepts_what_the_decoder_accepts(type_name: str) -> None:
    """A good message of every type is valid; without a required field, or with a wrong one, it is not."""
    schema = exported(f"{type_name}.json")
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert list(validator.iter_errors(event(type_name))) == []
    assert list(validator.iter_errors(event(type_name, unknown={"x": 1}))) == []
    field = next(iter(DATA[type_name]))
    assert not validator.is_valid(event(type_name, **{field: "a b"}))
    assert not validator.is_valid(event(type_name, **{field: None}))
    assert not validator.is_valid(event(type_name) | {"specversion": "1.1"})
    assert not validator.is_valid(event(type_name) | {"time": "yesterday"})
    assert not validator.is_valid(event(type_name) | {"source": ""})


def test_json_schema_of_a_rate_card() -> None:
    """The built-in card is valid by the exported schema, and a negative rate is not."""
    validator = Draft202012Validator(exported("rate_card.json"))
    assert validator.is_valid(json.loads((ROOT / "schemas/rate_cards/default.json").read_text("utf-8")))
    assert validator.is_valid({"versions": [{"effective_from": "2026-01-01T00:00:00Z", "asr": 0}]})
    assert not validator.is_valid({"versions": [{"effective_from": "2026-01-01T00:00:00Z", "asr": -1}]})
    assert not validator.is_valid({"versions": []})


def test_asyncapi_names_every_topic_message_and_reason() -> None:
    """Every topic; every reference leads somewhere; the dead letters' headers list every reason."""
    document = exported("asyncapi.json")
    assert document["asyncapi"] == "3.0.0"
    addresses = {channel["address"]: set(channel["messages"]) for channel in document["channels"].values()}
    assert addresses == {
        EVENTS: set(EVENT_MODELS),
        COMMANDS: set(COMMAND_MODELS),
        DEAD_LETTERS: {"dead_letter"},
        ALERTS: set(ALERT_MODELS),
    }
    for reference in references(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    headers = document["components"]["messages"]["dead_letter"]["headers"]
    assert set(headers["properties"]["reason"]["enum"]) == set(RejectReason)
    assert headers["required"] == ["reason", "detail", "topic", "partition", "offset", "appended_at_ms"]


def references(node: Any) -> list[str]:
    """Every `$ref` in the document."""
    if isinstance(node, list):
        return [found for item in node for found in references(item)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
    return own + [found for item in node.values() for found in references(item)]


def test_the_page_lists_every_setting() -> None:
    """With a meaning for each."""
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        assert f"| `METERING_{name.upper()}` |" in page
        assert field.description
        assert field.description in page
