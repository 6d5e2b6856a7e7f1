"""Writes the documents that other programs and people read, from the models that define everything.

`python -m schemas.export` writes JSON Schemas and the AsyncAPI document to `schemas/exported/`, and the table
of settings to `docs/settings.md`. A test fails when they are not current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, SecretStr

from schemas import topics
from schemas.alerts import ALERT_MODELS
from schemas.cloudevents import EVENT_MODELS
from schemas.commands import COMMAND_MODELS
from schemas.rate_card import RateCardFile
from schemas.records import DeadLetter, FenceMove, LedgerLine, SettlementRecord
from schemas.rejections import RejectReason
from schemas.settings import PREFIX, RESERVED, Settings

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = Path("schemas/exported")
SETTINGS_PAGE = Path("docs/settings.md")

JsonObject: TypeAlias = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_RECORDS: dict[str, type[BaseModel]] = {
    "record.ledger_line": LedgerLine,
    "record.settlement": SettlementRecord,
    "record.fence_move": FenceMove,
    "record.dead_letter": DeadLetter,
}


def documents() -> dict[Path, str]:
    """Every exported file (relative to the repository) and its content."""
    models: dict[str, type[BaseModel]] = {
        **EVENT_MODELS,
        **COMMAND_MODELS,
        **ALERT_MODELS,
        **_RECORDS,
        "rate_card": RateCardFile,
    }
    files = {EXPORTED / f"{name}.json": _as_text(_schema(model)) for name, model in models.items()}
    files[EXPORTED / "asyncapi.json"] = _as_text(asyncapi())
    files[SETTINGS_PAGE] = settings_page()
    return files


def _as_text(document: JsonObject) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _schema(model: type[BaseModel]) -> JsonObject:
    return {"$schema": _DIALECT, **model.model_json_schema()}


def asyncapi() -> JsonObject:
    """The AsyncAPI 3.0 document: the topics, their keys, and what lies in them."""
    messages: JsonObject = {}
    schemas: JsonObject = {}
    for models, key in (
        (EVENT_MODELS, _SCOPE_KEY),
        (COMMAND_MODELS, _ACCOUNT_KEY),
        (ALERT_MODELS, _ACCOUNT_KEY),
    ):
        for type_name, model in models.items():
            messages[type_name] = _cloudevent_message(type_name, model, key, schemas)
    messages["dead_letter"] = _DEAD_LETTER
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Lingua Metering",
            "version": "1",
            "description": "What nodes, the scheduler and operators put into Kafka, what is refused, and alerts.",
        },
        "defaultContentType": "application/cloudevents+json",
        "channels": {
            "events": _channel(
                topics.EVENTS, "Usage and lifecycle events, keyed by scope.", list(EVENT_MODELS)
            ),
            "commands": _channel(topics.COMMANDS, "Money commands, keyed by account.", list(COMMAND_MODELS)),
            "dead_letters": _channel(
                topics.DEAD_LETTERS, "Refused messages with their original bytes.", ["dead_letter"]
            ),
            "alerts": _channel(
                topics.ALERTS, "Balances that fell past a threshold, keyed by account.", list(ALERT_MODELS)
            ),
        },
        "operations": {
            "receive_events": {"action": "receive", "channel": {"$ref": "#/channels/events"}},
            "receive_commands": {"action": "receive", "channel": {"$ref": "#/channels/commands"}},
            "send_dead_letters": {"action": "send", "channel": {"$ref": "#/channels/dead_letters"}},
            "send_alerts": {"action": "send", "channel": {"$ref": "#/channels/alerts"}},
        },
        "components": {"messages": messages, "schemas": schemas},
    }


_SCOPE_KEY = {
    "type": "string",
    "description": "The scope: room/<room_id> when the event has a room, else session/<session_id>. "
    "Partitioner murmur2_random. A wrong key costs locality, never correctness.",
}
_ACCOUNT_KEY = {
    "type": "string",
    "description": "The account: data.account. Partitioner murmur2_random.",
}
_DEAD_LETTER = {
    "name": "dead_letter",
    "title": "A message that was refused",
    "summary": "Key and payload are the original bytes; the headers, UTF-8 text, say why and from where.",
    "contentType": "application/octet-stream",
    "headers": {
        "type": "object",
        "required": ["reason", "detail", "topic", "partition", "offset", "appended_at_ms"],
        "properties": {
            "reason": {"type": "string", "enum": [reason.value for reason in RejectReason]},
            "detail": {"type": "string", "description": "the field and what is wrong with it, for people"},
            "topic": {"type": "string", "description": "of the original message"},
            "log": {"type": "string", "description": "id of that topic: one made anew counts offsets anew"},
            "partition": {"type": "string", "pattern": "^[0-9]+$", "description": "of the original message"},
            "offset": {"type": "string", "pattern": "^[0-9]+$", "description": "of the original message"},
            "appended_at_ms": {
                "type": "string",
                "pattern": "^-?[0-9]+$",
                "description": "broker's append time of the original message, ms since the Unix epoch",
            },
        },
    },
    "payload": {"description": "The original bytes, or no value when the message had none."},
    "bindings": {"kafka": {"key": {"description": "The original key."}}},
}


def _channel(address: str, description: str, names: list[str]) -> JsonObject:
    return {
        "address": address,
        "description": description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        "bindings": {"kafka": {"topic": address}},
    }


def _cloudevent_message(
    type_name: str, model: type[BaseModel], key: JsonObject, schemas: JsonObject
) -> JsonObject:
    """One message; the schema and its parts go to `schemas`, where each of them has its name."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    return {
        "name": type_name,
        "title": (model.__doc__ or "").strip(),
        "contentType": "application/cloudevents+json",
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        "bindings": {"kafka": {"key": key}},
    }


def settings_page() -> str:
    """docs/settings.md: every setting, its type, default and meaning."""
    lines = [
        "# Settings",
        "",
        "Written by `python -m schemas.export` from `schemas/settings.py`; do not edit.",
        "",
        "A setting comes from the environment, else from the TOML file that `METERING_SETTINGS` names (there",
        "the key is the name without `METERING_`, in lower case), else it is the default. An empty variable",
        "counts as not set. An unknown name with this prefix, or a value that is not accepted, ends the",
        "program with one line that says so. Names that end in `_ms` are milliseconds, in `_s` seconds.",
        "",
        "| setting | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in Settings.model_fields.items():
        lines.append(
            f"| `{PREFIX}{name.upper()}` | {_type_name(field.annotation)} | {_default(field.default)} "
            f"| {field.description} |"
        )
    lines += [
        "",
        "These names have the prefix too, but are no settings:",
        "",
        "| name | meaning |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in RESERVED.items()]
    return "\n".join(lines) + "\n"


def _type_name(annotation: object) -> str:
    parts = [part for part in get_args(annotation) or (annotation,) if part is not type(None)]
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        Path: "path",
        SecretStr: "secret",
    }
    return " or ".join(names[part] for part in parts)


def _default(value: object) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Write every document; files in `schemas/exported/` that nothing defines any more are removed."""
    files = documents()
    for path, content in files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(content, encoding="utf-8")
    for path in (ROOT / EXPORTED).iterdir():
        if path.relative_to(ROOT) not in files:
            path.unlink()


if __name__ == "__main__":
    main()
