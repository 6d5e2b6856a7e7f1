"""The OpenAPI document: what FastAPI derives, with every error as the problem that it is."""

from __future__ import annotations

from collections import defaultdict
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from accounts.api.problems import MEDIA_TYPE, STATUS, TYPE_PREFIX, Problem
from accounts.errors import Reason

Responses = dict[int | str, dict[str, Any]]

DESCRIPTION = """
Users, their nodes, and their balances.

* Users log in and send `Authorization: Bearer <access_token>`; nodes likewise, with a token of `/v1/nodes/token`.
* Every error is a problem (RFC 9457): `application/problem+json` with a stable `type`.
* Amounts are decimal minutes as text; fields in `_us` are service microseconds, 60 000 000 a minute.
* Moving money takes an `Idempotency-Key`. After any failure repeat the same request with the same key: it is
carried
  out once.
* Lists are paged, the newest first: hand `next_cursor` back as `cursor`.
"""


def problems(*reasons: Reason) -> Responses:
    """The `responses` of an endpoint that refuses for these reasons."""
    by_status: dict[int, list[str]] = defaultdict(list)
    for reason in reasons:
        by_status[int(STATUS[reason][0])].append(reason.value)
    return {
        status: {"description": f"{HTTPStatus(status).phrase}: {', '.join(sorted(names))}"}
        for status, names in by_status.items()
    }


def install(app: FastAPI) -> None:
    """Replace FastAPI's document by ours, made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # FastAPI's documented way


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    schemas = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, definitions = models_json_schema(
        [(Problem, "serialization")], ref_template="#/components/schemas/{model}"
    )
    schemas.update(definitions["$defs"])
    for path in made["paths"].values():
        for operation in path.values():
            _complete(operation)
    return made


def _complete(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "requestBody" in operation:
        responses.setdefault("413", {"description": "Content Too Large: more than 64 KiB"})
    if "requestBody" in operation or operation.get("parameters"):
        known = responses.get("422", {}).get("description", "")
        extra = known.partition(": ")[2] if known.startswith("Unprocessable") else ""
        reasons = ", ".join(filter(None, ["invalid-request", extra]))
        responses["422"] = {"description": f"Unprocessable Content: {reasons}"}
    known = responses.get("503", {}).get("description", "").partition(": ")[2]
    responses["503"] = {
        "description": f"Service Unavailable: {', '.join(filter(None, ['database-away', known]))}"
    }
    for status, response in responses.items():
        if int(status) < 400:
            continue
        kinds = response["description"].partition(": ")[2].split(", ")
        response["content"] = {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "example": {
                    "type": TYPE_PREFIX + kinds[0],
                    "title": kinds[0].replace("-", " ").capitalize(),
                    "status": int(status),
                    "detail": "a sentence for people",
                },
            }
        }
        if status == "429":
            response["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait"}
            }
