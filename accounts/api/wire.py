"""What the API takes and gives, as pydantic models: the OpenAPI document is made from them.

Amounts are minutes, as decimal text; `_us` beside them are the same in service microseconds, for programs.
Instants are RFC 3339.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, EmailStr, Field, StringConstraints

from accounts import gateway, logins, nodes, users
from accounts.audit import ActorType
from accounts.errors import Reason, Refused
from accounts.gateway import minutes_text
from accounts.models import AuditEntry
from accounts.money import Answer, Status
from accounts.passwords import MAX_CHARACTERS, MIN_CHARACTERS
from metering.money import US_PER_MINUTE
from schemas.rfc3339 import format_rfc3339_ms

_ID = re.compile(r"\A[A-Za-z0-9._:-]{1,128}\Z")

PRINTABLE = r"^[^\x00-\x1F\x7F]+$"
ID = r"^[A-Za-z0-9._:-]{1,128}$"
NODE_ID = r"^[A-Za-z0-9._-]{1,64}$"
KEY = r"^[A-Za-z0-9._:-]{1,56}$"
"""Of an Idempotency-Key: with a node's name before it, it is still an id."""

Username = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{2,31}$"),
    Field(description="3 to 32 letters, digits, dots, dashes; no two differ in case only", examples=["ada"]),
]
Email = Annotated[EmailStr, Field(max_length=254, examples=["ada@example.com"])]
NewPassword = Annotated[
    str,
    StringConstraints(min_length=MIN_CHARACTERS, max_length=MAX_CHARACTERS),
    Field(description="any characters; length is what counts", examples=["a rather long password"]),
]
GivenPassword = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS)]
DisplayName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=PRINTABLE)]
Words = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256, pattern=PRINTABLE),
    Field(description="why, for the ledger and the audit log", examples=["paid by bank transfer"]),
]
Language = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}$"),
    Field(description="a language tag (BCP 47)", examples=["en"]),
]
Minutes = Annotated[str, Field(description="decimal minutes, exact to the 9th place", examples=["29.5"])]
Us = Annotated[int, Field(description="the same in service microseconds; 60 000 000 are a minute")]
Instant = Annotated[str, Field(description="RFC 3339", examples=["2026-01-01T00:00:00.000Z"])]


def _not_zero(minutes: str) -> str:
    if Decimal(minutes) == 0:
        raise ValueError("must not be 0")
    return minutes


_NOT_ZERO: dict[str, Any] = {"not": {"pattern": r"^-?[0.]+$"}}
PositiveMinutes = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{1,7}(\.[0-9]{1,7})?$"),
    AfterValidator(_not_zero),
    Field(description="decimal minutes, above 0", examples=["30", "0.5"], json_schema_extra=_NOT_ZERO),
]
SignedMinutes = Annotated[
    str,
    StringConstraints(pattern=r"^-?[0-9]{1,7}(\.[0-9]{1,7})?$"),
    AfterValidator(_not_zero),
    Field(
        description="decimal minutes, positive in the account's favour, not 0",
        examples=["-2.5"],
        json_schema_extra=_NOT_ZERO,
    ),
]


def amount_us(minutes: str) -> int:
    """Exact: seven places of a minute are whole microseconds."""
    return int(Decimal(minutes) * US_PER_MINUTE)


class Body(BaseModel):
    """What a client sends; a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid")


class Register(Body):
    """A new user."""

    username: Username
    email: Email
    password: NewPassword


class LogIn(Body):
    """Credentials of a user."""

    login: Annotated[
        str,
        StringConstraints(min_length=1, max_length=254, pattern=PRINTABLE),
        Field(description="username or e-mail address", examples=["ada"]),
    ]
    password: GivenPassword


class RefreshToken(Body):
    """A refresh token."""

    refresh_token: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=PRINTABLE)]


class ChangePassword(Body):
    """The password there is, and the one to be."""

    current_password: GivenPassword
    new_password: NewPassword


class ChangeProfile(Body):
    """What to change; what is absent stays."""

    display_name: DisplayName | None = None
    language: Language | None = None


class Order(Body):
    """Every node that is bound to the user, each once; the first pays write-offs first."""

    node_ids: Annotated[
        list[Annotated[str, StringConstraints(pattern=NODE_ID)]], Field(max_length=nodes.MAX_BINDINGS)
    ]


class RegisterNode(Body):
    """A new node."""

    name: DisplayName
    node_id: Annotated[str, StringConstraints(pattern=NODE_ID)] | None = Field(
        default=None, description="operators only; otherwise the server makes one", examples=["n-17"]
    )


class NodeCredentials(Body):
    """Credentials of a node."""

    client_id: Annotated[str, StringConstraints(pattern=NODE_ID)]
    client_secret: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=PRINTABLE)]


class EnterCode(Body):
    """A user's security code, as the user gave it."""

    security_code: Annotated[
        str,
        StringConstraints(min_length=1, max_length=32, pattern=PRINTABLE),
        Field(description="8 characters; case, spaces and dashes do not matter", examples=["K7QM-4XTB"]),
    ]


class TopUp(Body):
    """Minutes to give."""

    minutes: PositiveMinutes
    reason: Words = "top-up"


class Adjustment(Body):
    """A correction of a balance, in either direction."""

    minutes: SignedMinutes
    reason: Words


class Accepted(BaseModel):
    """Taken in."""

    status: Literal["accepted"] = "accepted"


class TokenPair(BaseModel):
    """What a client holds after logging in."""

    access_token: str = Field(description="for the header `Authorization: Bearer`; a JWT")
    refresh_token: str = Field(description="works once, and gives the next one")
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int = Field(description="seconds that the access token lives")

    @classmethod
    def of(cls, tokens: logins.Tokens) -> TokenPair:
        """From the domain."""
        return cls(
            access_token=tokens.access_token,
            refresh_token=tokens.refresh_token,
            expires_in=tokens.expires_in_s,
        )


class NodeToken(BaseModel):
    """What a node holds after giving its credentials."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int


class ProfileOut(BaseModel):
    """A person."""

    user_id: str
    username: str
    email: str
    role: Literal["user", "operator"]
    display_name: str
    language: str
    created_at: Instant

    @classmethod
    def of(cls, profile: users.Profile) -> ProfileOut:
        """From the domain."""
        return cls(
            user_id=profile.user_id,
            username=profile.username,
            email=profile.email,
            role=profile.role,
            display_name=profile.display_name,
            language=profile.language,
            created_at=format_rfc3339_ms(profile.created_at_ms),
        )


class SecurityCode(BaseModel):
    """The code by which the user lets a node bind itself."""

    security_code: str = Field(examples=["K7QM4XTB"])


class LoginOut(BaseModel):
    """A living log-in."""

    login_id: str
    current: bool = Field(description="whether it is that of this very request")
    created_at: Instant
    refreshed_at: Instant
    expires_at: Instant


class Logins(BaseModel):
    """The user's living log-ins, the newest first."""

    items: list[LoginOut]


class BalanceOut(BaseModel):
    """A live balance."""

    account: str = Field(examples=["user/01k3"])
    balance: Minutes
    held: Annotated[str, Field(description="minutes that running sessions hold")]
    floor: Annotated[str, Field(description="minutes at or below which nothing is admitted")]
    balance_us: Us
    held_us: Us
    floor_us: Us
    updated_at: Instant | None = Field(description="of the last change; null when there was none")

    @classmethod
    def of(cls, balance: gateway.Balance) -> BalanceOut:
        """From the gateway."""
        updated = balance.updated_at_ms
        return cls(
            account=balance.account,
            balance=minutes_text(balance.balance_us),
            held=minutes_text(balance.held_us),
            floor=minutes_text(balance.floor_us),
            balance_us=balance.balance_us,
            held_us=balance.held_us,
            floor_us=balance.floor_us,
            updated_at=None if updated is None else format_rfc3339_ms(updated),
        )


class StatementLine(BaseModel):
    """One change of the balance."""

    ledger_id: str = Field(description="account and number of the line", examples=["user/01k3/12"])
    user_id: str | None = Field(description="null for a node's line")
    node_id: str | None = Field(description="null for a user's line")
    session_id: str | None
    room_id: str | None
    change_minutes: Minutes
    balance_before: Minutes
    balance_after: Minutes
    change_us: Us
    balance_before_us: Us
    balance_after_us: Us
    reason: str = Field(examples=["charge"])
    request_id: str | None = Field(description="of a money command")
    cell_id: str | None = Field(description="scope and minute of a charge or credit")
    note: str | None = Field(description="the words given with a money command")
    posted_at: Instant

    @classmethod
    def of(cls, line: gateway.StatementLine) -> StatementLine:
        """From the gateway."""
        kind, _, account_id = line.account.partition("/")
        return cls(
            ledger_id=f"{line.account}/{line.seq}",
            user_id=account_id if kind == "user" else None,
            node_id=account_id if kind == "node" else None,
            session_id=line.session_id or None,
            room_id=line.room_id or None,
            change_minutes=minutes_text(line.change_us),
            balance_before=minutes_text(line.balance_before_us),
            balance_after=minutes_text(line.balance_after_us),
            change_us=line.change_us,
            balance_before_us=line.balance_before_us,
            balance_after_us=line.balance_after_us,
            reason=line.reason,
            request_id=line.request_id or None,
            cell_id=line.cell_id or None,
            note=line.note or None,
            posted_at=format_rfc3339_ms(line.posted_at_ms),
        )


class UsageOut(BaseModel):
    """What the user was charged in one session or room."""

    id: str = Field(description="of the session or the room")
    charged_minutes: Minutes
    charged_us: Us
    total_minutes: Annotated[str, Field(description="of all who paid, in decimal minutes")]
    total_us: Us
    active_minutes: int = Field(description="minutes of the clock in which the user paid something")
    first_minute: Instant
    last_minute: Instant
    settled: bool = Field(description="whether the session or room is over and settled")

    @classmethod
    def of(cls, usage: gateway.UsageTotal) -> UsageOut:
        """From the gateway."""
        return cls(
            id=usage.id,
            charged_minutes=minutes_text(usage.charged_us),
            charged_us=usage.charged_us,
            total_minutes=minutes_text(usage.total_us),
            total_us=usage.total_us,
            active_minutes=usage.minutes,
            first_minute=format_rfc3339_ms(usage.first_window_start_ms),
            last_minute=format_rfc3339_ms(usage.last_window_start_ms),
            settled=usage.settled,
        )


UsageBy = Literal["session", "room"]
Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A page, the newest first; `next_cursor` gives the one after it, and is null at the end."""

    items: list[Item]
    next_cursor: str | None


class NodeOut(BaseModel):
    """A node."""

    node_id: str
    name: str
    owner_id: str
    created_at: Instant

    @classmethod
    def of(cls, node: nodes.NodeShown) -> NodeOut:
        """From the domain."""
        return cls(
            node_id=node.node_id,
            name=node.name,
            owner_id=node.owner_id,
            created_at=format_rfc3339_ms(node.created_at_ms),
        )


class NewNode(NodeOut):
    """A node with its secret."""

    client_id: str
    client_secret: str = Field(description="shown this once; the server keeps a hash")


class NewSecret(BaseModel):
    """A node's new secret."""

    client_id: str
    client_secret: str = Field(description="shown this once; the server keeps a hash")


class Nodes(BaseModel):
    """Nodes of one owner, the oldest first."""

    items: list[NodeOut]


class BoundNodeOut(BaseModel):
    """A node that is bound to the user."""

    node_id: str
    name: str
    position: int = Field(description="1 pays write-offs first")
    bound_at: Instant


class BoundNodes(BaseModel):
    """The nodes that are bound to the user, the first to pay first."""

    items: list[BoundNodeOut]

    @classmethod
    def of(cls, bound: list[nodes.BoundNode]) -> BoundNodes:
        """From the domain."""
        return cls(
            items=[
                BoundNodeOut(
                    node_id=node.node_id,
                    name=node.name,
                    position=node.position,
                    bound_at=format_rfc3339_ms(node.bound_at_ms),
                )
                for node in bound
            ]
        )


class BoundUserOut(BaseModel):
    """A user whom the node is bound to."""

    user_id: str
    username: str
    display_name: str
    bound_at: Instant

    @classmethod
    def of(cls, user: nodes.BoundUser) -> BoundUserOut:
        """From the domain."""
        return cls(
            user_id=user.user_id,
            username=user.username,
            display_name=user.display_name,
            bound_at=format_rfc3339_ms(user.bound_at_ms),
        )


class BoundUserBalance(BoundUserOut):
    """The same with the live balance."""

    balance: BalanceOut


class BoundUsers(BaseModel):
    """The users whom the node is bound to, the longest first."""

    items: list[BoundUserBalance]


class MoneyAnswer(BaseModel):
    """What is known of a money request."""

    request_id: str
    status: Status
    account: str | None = Field(description="null for one that was not asked for here")
    amount: Annotated[str, Field(description="minutes that were moved")] | None
    balance: Annotated[str, Field(description="minutes of the account, right after")] | None
    amount_us: int | None
    balance_us: int | None
    at: Instant | None

    @classmethod
    def of(cls, answer: Answer) -> MoneyAnswer:
        """From the domain."""
        return cls(
            request_id=answer.request_id,
            status=answer.status,
            account=answer.account,
            amount=None if answer.amount_us is None else minutes_text(answer.amount_us),
            balance=None if answer.balance_us is None else minutes_text(answer.balance_us),
            amount_us=answer.amount_us,
            balance_us=answer.balance_us,
            at=None if answer.at_ms is None else format_rfc3339_ms(answer.at_ms),
        )


class AuditOut(BaseModel):
    """A privileged act."""

    audit_id: int
    actor_type: ActorType
    actor_id: str
    action: str
    target: str
    request_id: str | None
    payload: dict[str, Any]
    at: Instant

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditOut:
        """From the database."""
        return cls(
            audit_id=entry.audit_id,
            actor_type=ActorType(entry.actor_type),
            actor_id=entry.actor_id,
            action=entry.action,
            target=entry.target,
            request_id=entry.request_id,
            payload=json.loads(entry.payload),
            at=format_rfc3339_ms(entry.at_ms),
        )


class Jwk(BaseModel):
    """A public key (RFC 8037)."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    use: Literal["sig"]
    alg: Literal["EdDSA"]
    kid: str
    x: str


class Jwks(BaseModel):
    """The keys that verify access tokens now."""

    keys: list[Jwk]


class Ready(BaseModel):
    """What answers and what does not."""

    database: Literal["ok"]
    balances: Literal["ok", "away"]
    archive: Literal["ok", "away"]


class Alive(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


def cursor_of(*place: int | str) -> str:
    """A place in a list, as clients hand it back; what is in it is nobody's business."""
    return base64.urlsafe_b64encode(json.dumps(place, separators=(",", ":")).encode()).rstrip(b"=").decode()


def place_of(cursor: str | None, *kinds: type) -> tuple[Any, ...] | None:
    """The place that a cursor of ours names. Raises Refused, BAD_CURSOR, for any other."""
    if cursor is None:
        return None
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        fits = isinstance(place, list) and [type(part) for part in place] == list(kinds)
    except (ValueError, binascii.Error, RecursionError):
        fits = False
    if not fits or not all(
        abs(part) < 2**62 if isinstance(part, int) else _ID.search(part) for part in place
    ):
        raise Refused(Reason.BAD_CURSOR, "the cursor is not one that this list gave")
    return tuple(place)
