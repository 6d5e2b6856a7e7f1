"""Endpoints about the service itself: health, keys, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from accounts.api import wire
from accounts.api.deps import InAccounts, InGateway
from accounts.errors import DatabaseUnfit, Reason, Refused
from accounts.migrate import require_current

router = APIRouter(tags=["Service"])


@router.get("/healthz")
def healthy() -> wire.Alive:
    """The process runs."""
    return wire.Alive()


@router.get("/readyz")
def ready(accounts: InAccounts, gateway: InGateway) -> wire.Ready:
    """Whether requests can be served: 503 without the database; balances and archive may be away for a while."""
    try:
        require_current(accounts.database)
    except DatabaseUnfit as problem:
        raise Refused(Reason.DATABASE_UNFIT, str(problem)) from None
    try:
        gateway.balances.read([])
        balances = True
    except Refused:
        balances = False
    return wire.Ready(
        database="ok",
        balances="ok" if balances else "away",
        archive="ok" if gateway.archive.ready() else "away",
    )


@router.get("/.well-known/jwks.json")
def keys(accounts: InAccounts, response: Response) -> wire.Jwks:
    """The keys that verify access tokens now. Fetch them again when a token names one that is not known."""
    response.headers["Cache-Control"] = "public, max-age=60"
    return wire.Jwks.model_validate(accounts.tokens.jwks(accounts.now_ms()))


@router.get("/metrics", include_in_schema=False)
def prometheus() -> Response:
    """For Prometheus."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
