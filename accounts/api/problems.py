"""Every error as a problem (RFC 9457, application/problem+json).

A problem says what was refused, and for a request that does not fit the schema, where. It never repeats what
was sent: a body may hold a password.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from accounts.errors import Reason, Refused

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:lingua-metering:problem:"

log = logging.getLogger("lingua.accounts")

STATUS: Mapping[Reason, tuple[HTTPStatus, str]] = {
    Reason.BAD_CREDENTIALS: (HTTPStatus.UNAUTHORIZED, "Credentials are not right"),
    Reason.BAD_TOKEN: (HTTPStatus.UNAUTHORIZED, "Token is not valid"),
    Reason.REFRESH_REUSED: (HTTPStatus.UNAUTHORIZED, "Refresh token was used before"),
    Reason.FORBIDDEN: (HTTPStatus.FORBIDDEN, "Not allowed"),
    Reason.NOT_FOUND: (HTTPStatus.NOT_FOUND, "Not found"),
    Reason.USERNAME_TAKEN: (HTTPStatus.CONFLICT, "Username is taken"),
    Reason.NODE_ID_TAKEN: (HTTPStatus.CONFLICT, "Node id is taken"),
    Reason.WEAK_PASSWORD: (HTTPStatus.UNPROCESSABLE_ENTITY, "Password is too weak"),
    Reason.WRONG_CODE: (HTTPStatus.NOT_FOUND, "Security code is not right"),
    Reason.ALREADY_BOUND: (HTTPStatus.CONFLICT, "Bound already"),
    Reason.WRONG_ORDER: (HTTPStatus.CONFLICT, "Order does not fit"),
    Reason.TOO_MANY: (HTTPStatus.CONFLICT, "Too many"),
    Reason.TOO_MANY_ATTEMPTS: (HTTPStatus.TOO_MANY_REQUESTS, "Too many attempts"),
    Reason.REQUEST_CONFLICT: (HTTPStatus.CONFLICT, "Request id was used with another body"),
    Reason.INSUFFICIENT_CREDIT: (HTTPStatus.CONFLICT, "The node has not enough credit"),
    Reason.OVER_LIMIT: (HTTPStatus.UNPROCESSABLE_ENTITY, "A balance would leave its range"),
    Reason.BALANCES_AWAY: (HTTPStatus.SERVICE_UNAVAILABLE, "Balances are not available"),
    Reason.ARCHIVE_AWAY: (HTTPStatus.SERVICE_UNAVAILABLE, "Archive is not available"),
    Reason.COMMANDS_AWAY: (HTTPStatus.SERVICE_UNAVAILABLE, "Command was not confirmed"),
    Reason.BAD_CURSOR: (HTTPStatus.UNPROCESSABLE_ENTITY, "Cursor is not valid"),
    Reason.DATABASE_UNFIT: (HTTPStatus.SERVICE_UNAVAILABLE, "Accounts database is not ready"),
}


class FieldError(BaseModel):
    """One thing that does not fit the schema."""

    where: str = Field(description="body, query, path or header, and the field", examples=["body.username"])
    message: str = Field(description="what is wrong with it", examples=["must match the pattern"])


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: str = Field(description="which kind of problem; stable", examples=[TYPE_PREFIX + "bad-credentials"])
    title: str = Field(description="the same for every problem of this type")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="a sentence about this one, for people")
    errors: list[FieldError] | None = Field(default=None, description="for a request that does not fit")
    request_id: str | None = Field(default=None, description="of the money request that was refused")


def problem(
    status: int,
    kind: str,
    title: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """An answer that is a problem."""
    body = {"type": TYPE_PREFIX + kind, "title": title, "status": int(status), "detail": detail, **more}
    return JSONResponse(body, int(status), headers=dict(headers or {}), media_type=MEDIA_TYPE)


def refusal(refused: Refused, **more: Any) -> JSONResponse:
    """What the domain refused, as a problem."""
    status, title = STATUS[refused.reason]
    headers = {}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(refused.retry_after_s)
    if status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(status, refused.reason, title, refused.detail, headers=headers, **more)


def install(app: FastAPI) -> None:
    """Have every error of this application answered as a problem."""

    @app.exception_handler(Refused)
    async def _refused(_request: Request, error: Refused) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def _does_not_fit(_request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(field_errors(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == HTTPStatus.BAD_REQUEST:
            # What FastAPI says of a body whose bytes are not even text.
            return _invalid([{"where": "body", "message": "is not JSON"}])
        status = HTTPStatus(error.status_code)
        kind = status.phrase.lower().replace(" ", "-")
        return problem(
            status, kind, status.phrase, status.description or status.phrase, headers=error.headers
        )

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    async def _database_away(_request: Request, error: Exception) -> JSONResponse:
        log.error("the accounts database does not answer: %s", str(error).splitlines()[0])
        return problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "database-away",
            "Accounts database is not available",
            "the accounts database does not answer now; try again later",
            headers={"Retry-After": "5"},
        )

    @app.exception_handler(Exception)
    async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected: %s", type(error).__name__, exc_info=error)
        return problem(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "internal",
            "Internal error",
            "this is a fault of the server; it is in its log",
        )


def _invalid(errors: list[dict[str, str]]) -> JSONResponse:
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid-request",
        "Request does not fit the schema",
        "see `errors` for what does not fit, and where",
        errors=errors,
    )


def field_errors(errors: Sequence[Any]) -> list[dict[str, str]]:
    """Where, and what is wrong there; nothing of what was sent."""
    return [
        {
            "where": ".".join(str(part) for part in error["loc"]) or "body",
            "message": str(error["msg"]).removeprefix("Value error, "),
        }
        for error in errors
    ]
